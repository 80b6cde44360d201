//! The guest's processors, as dumps tell of them: made by hand, and as QEMU wrote it.

use crate::common::qemu::{Block, File, name};
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{GuestMemory, Processor, Processors};
use sonicshot_dump::{
    Dump, KdumpCompression, KdumpOptions, LayoutSpec, SnapshotFiles, write_kdump_without,
};
use std::fs;
use std::path::{Path, PathBuf};

const RUNS: (u64, u64, u64, u64) = (0x8005_0033, 0x123_4000, 0x37_0ef0, 0xd01);
const OFF: (u64, u64, u64, u64) = (0x11, 0, 0, 0);
const RESET: (u64, u64, u64, u64) = (0x6000_0010, 0, 0, 0);

/// A processor to be written down.
#[derive(Debug, Clone, Copy)]
struct Cpu {
    /// `CR0`, `CR3`, `CR4`, `EFER`.
    control: (u64, u64, u64, u64),
    rip: u64,
    rflags: u64,
    /// Selector and base.
    cs: (u32, u64),
    halted: u32,
    mp_state: u32,
    /// More of `hflags` than goes with the registers.
    hflags: u32,
    vm_hsave: u64,
}

const KERNEL: Cpu = Cpu {
    control: RUNS,
    rip: 0xffff_ffff_8100_0000,
    rflags: 0x246,
    cs: (0x10, 0),
    halted: 0,
    mp_state: 0,
    hflags: 0,
    vm_hsave: 0,
};
const NEVER: Cpu = Cpu {
    control: RESET,
    rip: 0xfff0,
    rflags: 2,
    cs: (0xf000, 0xffff_0000),
    halted: 1,
    ..KERNEL
};
/// Behind a `HLT` at 0x101.
const PARKED: Cpu = Cpu {
    control: OFF,
    rip: 0x102,
    rflags: 2,
    cs: (8, 0),
    halted: 1,
    ..KERNEL
};

fn started(cpu: &Cpu, with_efer: bool) -> Processor {
    let (cr0, cr3, cr4, efer) = cpu.control;
    Processor::Started(ControlRegisters::new(
        cr0,
        cr3,
        cr4,
        with_efer.then_some(efer),
    ))
}

fn data(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    folder.join(format!("{name}.zst"))
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

mod notes {
    use super::*;

    fn note(kind: u32, name: &str, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for word in [name.len() as u32 + 1, text.len() as u32, kind] {
            out.extend(word.to_le_bytes());
        }
        for part in [[name.as_bytes(), b"\0"].concat(), text.to_vec()] {
            out.extend(part);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    /// `struct elf_prstatus` of a processor.
    fn prstatus(cpu: &Cpu) -> Vec<u8> {
        let mut out = vec![0; 336];
        put(&mut out, 192, &7_u64.to_le_bytes());
        put(&mut out, 240, &cpu.rip.to_le_bytes());
        put(&mut out, 256, &cpu.rflags.to_le_bytes());
        put(&mut out, 264, &9_u64.to_le_bytes());
        out
    }

    /// `QEMUCPUState` of a processor.
    fn state(cpu: &Cpu) -> Vec<u8> {
        let mut out = vec![0; 440];
        put(&mut out, 0, &[1, 0, 0, 0, 0xb8, 1]);
        put(&mut out, 8, &7_u64.to_le_bytes());
        put(&mut out, 56, &9_u64.to_le_bytes());
        put(&mut out, 136, &cpu.rip.to_le_bytes());
        put(&mut out, 144, &cpu.rflags.to_le_bytes());
        put(&mut out, 152, &cpu.cs.0.to_le_bytes());
        put(&mut out, 168, &cpu.cs.1.to_le_bytes());
        let (cr0, cr3, cr4, _) = cpu.control;
        for (at, value) in [(392, cr0), (416, cr3), (424, cr4)] {
            put(&mut out, at, &value.to_le_bytes());
        }
        out
    }

    fn of_qemu(cpus: &[Cpu]) -> Vec<u8> {
        let status = cpus.iter().map(|cpu| note(1, "CORE", &prstatus(cpu)));
        let states = cpus.iter().map(|cpu| note(0, "QEMU", &state(cpu)));
        status.chain(states).flatten().collect()
    }

    /// A core with these notes and a page of memory, which has a `HLT` in it.
    fn core(notes: &[u8]) -> Vec<u8> {
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(4096, 0);
        put(&mut out, 16, &[4, 0, 62, 0, 1]);
        put(&mut out, 32, &[64]);
        put(&mut out, 52, &[64, 0, 56, 0, 2]);
        let at = 8192_u64;
        for (head, kind, at, len) in [(64, 4_u8, at, notes.len() as u64), (120, 1, 4096, 4096)] {
            put(&mut out, head, &[kind]);
            put(&mut out, head + 8, &at.to_le_bytes());
            put(&mut out, head + 32, &len.to_le_bytes());
            put(&mut out, head + 40, &len.to_le_bytes());
        }
        out.resize(8192, 0x90);
        out[4096 + 0x101] = 0xf4;
        out.extend(notes);
        out
    }

    fn told(folder: &Path, notes: &[u8]) -> Processors {
        let path = folder.join("core");
        fs::write(&path, core(notes)).unwrap();
        let dump = Dump::open(&path, None).unwrap();
        let told = dump.processors();
        // A kdump-compressed dump with the same notes says the same.
        let kdump = folder.join("kdump");
        let mut options = KdumpOptions::new(KdumpCompression::Zlib).notes(notes);
        options.machine = dump.machine();
        options.vmcoreinfo = dump.vmcoreinfo();
        let out = fs::File::create(&kdump).unwrap();
        let plan = crate::common::plan(dump.layout(), &[]);
        write_kdump_without(&dump, &plan, &out, &options).unwrap();
        assert_eq!(Dump::open(&kdump, None).unwrap().processors(), told);
        told
    }

    #[test]
    fn each_processor_is_told_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut cases = vec![
            (KERNEL, started(&KERNEL, false)),
            (NEVER, Processor::NotStarted),
            (PARKED, Processor::Parked),
        ];
        // An INIT leaves the cache bits of CR0.
        for cr0 in [0x10, 0x2000_0010, 0x4000_0010] {
            let cpu = Cpu {
                control: (cr0, 0, 0, 0),
                ..NEVER
            };
            cases.push((cpu, Processor::NotStarted));
        }
        // Any other value, and it is in firmware or in a kernel, however young.
        let almost = [
            Cpu {
                rip: 0xfff1,
                ..NEVER
            },
            Cpu {
                rip: 0xe05b,
                ..NEVER
            },
            Cpu {
                cs: (0xf000, 0xf0000),
                ..NEVER
            },
            Cpu {
                cs: (0, 0xffff_0000),
                ..NEVER
            },
            Cpu {
                control: (0x6000_0011, 0, 0, 0),
                ..NEVER
            },
            Cpu {
                control: (0x6000_0010, 0x1000, 0, 0),
                ..NEVER
            },
            Cpu {
                control: (0x6000_0010, 0, 0x20, 0),
                ..NEVER
            },
            // Waits for interrupts; runs; has paging on; is not behind a HLT; at no code at all.
            Cpu {
                rflags: 0x202,
                ..PARKED
            },
            Cpu {
                rip: 0x103,
                ..PARKED
            },
            Cpu {
                control: RUNS,
                ..PARKED
            },
            Cpu { rip: 0, ..PARKED },
            Cpu {
                rip: 0x2000,
                ..PARKED
            },
            Cpu {
                cs: (8, 1 << 40),
                ..PARKED
            },
        ];
        cases.extend(almost.map(|cpu| (cpu, started(&cpu, false))));
        for (cpu, want) in cases {
            let got = told(folder.path(), &of_qemu(&[KERNEL, cpu]));
            let all = Processors::Known(vec![started(&KERNEL, false), want]);
            assert_eq!(got, all, "{cpu:x?}");
            // The boot processor is never one of these.
            let got = told(folder.path(), &of_qemu(&[cpu]));
            assert_eq!(
                got,
                Processors::Known(vec![started(&cpu, false)]),
                "{cpu:x?}"
            );
        }
    }

    #[test]
    fn notes_that_do_not_go_together_tell_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let status = note(1, "CORE", &prstatus(&KERNEL));
        let good = state(&KERNEL);
        let with = |at: usize, byte: u8| {
            let mut state = good.clone();
            state[at] ^= byte;
            note(0, "QEMU", &state)
        };
        let table = [
            [status.clone(), status.clone(), with(0, 0)].concat(),
            [status.clone(), with(0, 0), with(0, 0)].concat(),
            with(0, 0),
            // Its version, its length, and a register that the other note has too.
            [status.clone(), with(0, 3)].concat(),
            [status.clone(), with(4, 8)].concat(),
            [status.clone(), with(8, 1)].concat(),
            [status.clone(), with(58, 1)].concat(),
            [status.clone(), with(140, 1)].concat(),
            [status.clone(), with(144, 1)].concat(),
            [status.clone(), note(0, "QEMU", &good[..431])].concat(),
            [note(1, "CORE", &[0; 336]), with(0, 0)].concat(),
            [note(1, "CORE", &[0; 335]), with(0, 0)].concat(),
        ];
        for notes in table {
            let got = told(folder.path(), &notes);
            assert!(matches!(got, Processors::NotTold(_)), "{got:?}");
        }
    }

    #[test]
    fn a_crashed_kernels_core_says_that_it_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let info = |text: &str| note(0, "VMCOREINFO", text.as_bytes());
        let status = note(1, "CORE", &prstatus(&KERNEL));
        let crashed = info("OSRELEASE=6.1.0\nPAGESIZE=4096\nCRASHTIME=1732800000\n");
        let running = info("OSRELEASE=6.1.0\nPAGESIZE=4096\n");
        let odd = info("OSRELEASE=6.1.0\nXCRASHTIME=1\nCRASHTIME=\nCRASHTIME=1x\n");
        let unknown = Processors::Unknown;
        let table = [
            (
                [status.clone(), crashed.clone()].concat(),
                Processors::Crashed,
            ),
            (
                [status.clone(), status.clone(), crashed.clone()].concat(),
                Processors::Crashed,
            ),
            ([status.clone(), running].concat(), unknown.clone()),
            ([status.clone(), odd].concat(), unknown.clone()),
            (crashed.clone(), unknown.clone()),
            (status.clone(), unknown.clone()),
            (Vec::new(), unknown.clone()),
            // `/proc/kcore` has a task's structure too.
            (
                [status.clone(), note(4, "CORE", &[0; 64]), crashed.clone()].concat(),
                unknown,
            ),
        ];
        for (notes, want) in table {
            assert_eq!(told(folder.path(), &notes), want);
        }
        // QEMU's notes go first, whatever the guest's own say.
        let both = [of_qemu(&[KERNEL]), crashed].concat();
        let want = Processors::Known(vec![started(&KERNEL, false)]);
        assert_eq!(told(folder.path(), &both), want);
    }
}

mod devices {
    use super::*;

    /// The fields of `cpu` up to `env.mp_state`: name, elements, length of each.
    const FIELDS: &[(&str, usize, usize)] = &[
        ("env.regs", 16, 8),
        ("env.eip", 1, 8),
        ("env.eflags", 1, 8),
        ("env.hflags", 1, 4),
        ("env.fpu", 4, 2),
        ("env.fpregs", 8, 10),
        ("env.segs", 6, 20),
        ("env.ldt_to_idt", 4, 20),
        ("env.sysenter", 1, 20),
        ("env.cr[0]", 1, 8),
        ("env.cr[2]", 1, 8),
        ("env.cr[3]", 1, 8),
        ("env.cr[4]", 1, 8),
        ("env.dr", 8, 8),
        ("env.a20_mask", 1, 4),
        ("env.mxcsr", 1, 4),
        ("env.xmm_regs", 16, 16),
        ("env.efer", 1, 8),
        ("env.star_to_kernelgsbase", 5, 8),
        ("env.smbase", 1, 4),
        ("env.pat", 1, 8),
        ("env.hflags2", 1, 4),
        ("env.vm_hsave", 1, 8),
        ("env.vm_vmcb", 1, 8),
        ("env.tsc_offset_to_v_tpr", 1, 29),
        ("env.mtrr", 1, 224),
        ("env.interrupt_injected", 1, 4),
        ("env.mp_state", 1, 4),
        ("env.rest", 1, 404),
    ];

    /// The state of the devices, as it is written.
    struct Devices {
        out: Vec<u8>,
        described: Vec<String>,
        footers: bool,
    }

    impl Devices {
        fn new() -> Self {
            Self {
                out: Vec::new(),
                described: Vec::new(),
                footers: true,
            }
        }

        /// A section: its name, instance, version, bytes, and what is said of its fields.
        fn add(&mut self, device: &str, instance: u32, version: u32, bytes: &[u8], fields: &str) {
            let number = self.described.len() as u32 + 3;
            self.out.push(4);
            self.out.extend(number.to_be_bytes());
            name(&mut self.out, device);
            self.out.extend(instance.to_be_bytes());
            self.out.extend(version.to_be_bytes());
            self.out.extend(bytes);
            if self.footers {
                self.out.push(0x7e);
                self.out.extend(number.to_be_bytes());
            }
            self.described.push(format!(
                r#"{{"name":"{device}","instance_id":{instance},"vmsd_name":"{device}","version":{version},{fields}}}"#
            ));
        }

        fn cpu(&mut self, number: u32, cpu: &Cpu, nested: Option<&Nested>) {
            let fields = r#""fields":[{"name":"halted","type":"uint32","size":4},{"name":"interrupt_request","type":"uint32","size":4}]"#;
            let mut common = cpu.halted.to_be_bytes().to_vec();
            common.extend([0; 4]);
            self.add("cpu_common", number, 1, &common, fields);
            let (bytes, mut fields) = cpu_fields(cpu);
            let mut bytes = bytes;
            if let Some(nested) = nested {
                bytes.extend(&nested.bytes);
                fields.push_str(&nested.described);
            }
            self.add("cpu", number, 12, &bytes, &fields);
        }

        /// All of it: the sections, their end, the description.
        fn bytes(&self) -> Vec<u8> {
            let description = format!(
                r#"{{"page_size":4096,"devices":[{}]}}"#,
                self.described.join(",")
            );
            let mut out = self.out.clone();
            out.extend([0, 6]);
            out.extend((description.len() as u32).to_be_bytes());
            out.extend(description.as_bytes());
            out
        }
    }

    fn cpu_fields(cpu: &Cpu) -> (Vec<u8>, String) {
        let (cr0, cr3, cr4, efer) = cpu.control;
        let hflags = cpu.hflags | (cr0 as u32 & 1) << 7 | (efer as u32 >> 10 & 1) << 14;
        let mut segments = vec![0; 20];
        segments.extend(cpu.cs.0.to_be_bytes());
        segments.extend(cpu.cs.1.to_be_bytes());
        segments.resize(120, 0);
        let mut bytes = Vec::new();
        let mut described = Vec::new();
        for (name, count, len) in FIELDS {
            let value = match *name {
                "env.eip" => cpu.rip.to_be_bytes().to_vec(),
                "env.eflags" => cpu.rflags.to_be_bytes().to_vec(),
                "env.hflags" => hflags.to_be_bytes().to_vec(),
                "env.segs" => segments.clone(),
                "env.cr[0]" => cr0.to_be_bytes().to_vec(),
                "env.cr[3]" => cr3.to_be_bytes().to_vec(),
                "env.cr[4]" => cr4.to_be_bytes().to_vec(),
                "env.efer" => efer.to_be_bytes().to_vec(),
                "env.vm_hsave" => cpu.vm_hsave.to_be_bytes().to_vec(),
                "env.mp_state" => cpu.mp_state.to_be_bytes().to_vec(),
                _ => vec![0x5a; count * len],
            };
            assert_eq!(value.len(), count * len, "{name}");
            bytes.extend(value);
            let count = if *count > 1 {
                format!(r#""array_len":{count},"#)
            } else {
                String::new()
            };
            described.push(format!(
                r#"{{"name":"{name}",{count}"type":"x","size":{len}}}"#
            ));
        }
        (bytes, format!(r#""fields":[{}]"#, described.join(",")))
    }

    /// The subsection with KVM's nested state.
    struct Nested {
        bytes: Vec<u8>,
        described: String,
    }

    fn subsection(out: &mut Vec<u8>, title: &str) {
        out.push(5);
        name(out, title);
        out.extend(1_u32.to_be_bytes());
    }

    fn nested(kind: &str, inner: &[u8]) -> Nested {
        let mut bytes = Vec::new();
        // Another one before it.
        subsection(&mut bytes, "cpu/poll_control_msr");
        bytes.extend([0; 8]);
        subsection(&mut bytes, "cpu/nested_state");
        bytes.extend([0, 1, 0, u8::from(kind == "svm"), 0, 0, 16, 128]);
        let title = format!("cpu/kvm_nested_state/{kind}");
        subsection(&mut bytes, &title);
        bytes.extend([0; 8]);
        let field =
            |name: &str, len: usize| format!(r#"{{"name":"{name}","type":"x","size":{len}}}"#);
        let part = if kind == "svm" {
            let data = r#"{"name":"data.svm[0].vmcb12","array_len":4096,"type":"uint8","size":1}"#;
            format!(
                r#"{{"vmsd_name":"{title}","version":1,"fields":[{},{data}]}}"#,
                field("hdr.svm.vmcb_pa", 8)
            )
        } else {
            bytes.extend([0; 10]);
            subsection(&mut bytes, "cpu/kvm_nested_state/vmx/vmcs12");
            let data = r#"{"name":"data.vmx[0].vmcs12","array_len":4096,"type":"uint8","size":1}"#;
            format!(
                r#"{{"vmsd_name":"{title}","version":1,"fields":[{},{},{}],"subsections":[{{"vmsd_name":"cpu/kvm_nested_state/vmx/vmcs12","version":1,"fields":[{data}]}}]}}"#,
                field("hdr.vmx.vmxon_pa", 8),
                field("hdr.vmx.vmcs12_pa", 8),
                field("hdr.vmx.smm.flags", 2)
            )
        };
        bytes.extend(inner);
        let size =
            bytes.len() - (6 + "cpu/poll_control_msr".len() + 8) - (6 + "cpu/nested_state".len());
        let state = format!(
            r#"{{"vmsd_name":"cpu/kvm_nested_state","version":1,"fields":[{},{},{}],"subsections":[{part}]}}"#,
            field("flags", 2),
            field("format", 2),
            field("size", 4)
        );
        let poll = format!(
            r#"{{"vmsd_name":"cpu/poll_control_msr","version":1,"fields":[{}]}}"#,
            field("env.poll_control_msr", 8)
        );
        let described = format!(
            r#","subsections":[{poll},{{"vmsd_name":"cpu/nested_state","version":1,"fields":[{{"name":"env.nested_state","type":"struct","struct":{state},"size":{size}}}]}}]"#
        );
        Nested { bytes, described }
    }

    /// A host's registers in a page of AMD's.
    fn vmcb(control: (u64, u64, u64, u64)) -> Vec<u8> {
        let mut out = vec![0; 4096];
        let (cr0, cr3, cr4, efer) = control;
        for (at, value) in [(0x558, cr0), (0x550, cr3), (0x548, cr4), (0x4d0, efer)] {
            put(&mut out, at, &value.to_le_bytes());
        }
        out
    }

    fn vmcs12(control: (u64, u64, u64, u64), exit_controls: u32) -> Vec<u8> {
        let mut out = vec![0; 4096];
        let (cr0, cr3, cr4, efer) = control;
        put(&mut out, 0, &0x11e5_7ed0_u32.to_le_bytes());
        for (at, value) in [(584, cr0), (592, cr3), (600, cr4), (264, efer)] {
            put(&mut out, at, &value.to_le_bytes());
        }
        put(&mut out, 768, &exit_controls.to_le_bytes());
        out
    }

    /// A mapped-ram file with these devices and 16 pages of memory.
    fn mapped_ram(devices: &[u8]) -> Vec<u8> {
        let mut pages = vec![Some(1); 16];
        pages[3] = None;
        let mut out = File::new(vec![Block("pc.ram", pages)]).bytes();
        let end = out.len() - b"the devices' state".len();
        out.truncate(end);
        out.extend(devices);
        out
    }

    /// The same as a stream.
    fn stream(devices: &[u8]) -> Vec<u8> {
        let mut out = crate::common::qemu::stream();
        let end = out.len() - b"\x04 the devices' state".len();
        out.truncate(end);
        out.extend(devices);
        out
    }

    fn open(folder: &Path, bytes: &[u8]) -> Dump {
        let path = folder.join("guest");
        fs::write(&path, bytes).unwrap();
        Dump::open(&path, None).unwrap()
    }

    /// The processors that both kinds of files with these devices tell of.
    fn told(folder: &Path, devices: &[u8]) -> Processors {
        let of_mapped = open(folder, &mapped_ram(devices)).processors();
        let of_stream = open(folder, &stream(devices)).processors();
        assert_eq!(of_mapped, of_stream);
        of_mapped
    }

    fn of(cpus: &[Cpu]) -> Devices {
        let mut devices = Devices::new();
        let timer = r#""fields":[{"name":"data","size":24,"type":"buffer"}]"#;
        devices.add("timer", 0, 2, &[0; 24], timer);
        for (number, cpu) in (0..).zip(cpus) {
            devices.cpu(number, cpu, None);
        }
        devices.add(
            "serial",
            0,
            3,
            &[1; 11],
            r#""fields":[{"name":"a","type":"x","size":11}]"#,
        );
        devices
    }

    #[test]
    fn each_processor_is_told_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let cpu = |change: fn(&mut Cpu), mut from: Cpu| {
            change(&mut from);
            from
        };
        let started = |cpu: Cpu| (cpu, started(&cpu, true));
        let nested = Processor::InNestedGuest { host: None };
        let table = [
            started(KERNEL),
            started(cpu(|cpu| cpu.halted = 1, KERNEL)),
            (NEVER, Processor::NotStarted),
            (PARKED, Processor::Parked),
            // Under KVM.
            (
                cpu(|cpu| (cpu.mp_state, cpu.halted) = (1, 0), NEVER),
                Processor::NotStarted,
            ),
            (
                cpu(|cpu| (cpu.mp_state, cpu.halted) = (2, 0), NEVER),
                Processor::NotStarted,
            ),
            (cpu(|cpu| cpu.mp_state = 3, PARKED), Processor::Parked),
            started(cpu(|cpu| cpu.mp_state = 3, KERNEL)),
            // It is about to run, or runs.
            started(cpu(|cpu| cpu.halted = 0, NEVER)),
            started(cpu(|cpu| cpu.halted = 0, PARKED)),
            started(cpu(|cpu| cpu.rflags = 0x202, PARKED)),
            started(cpu(|cpu| cpu.rip = 0xe05b, NEVER)).clone_parked(),
            (cpu(|cpu| cpu.hflags = 1 << 19, KERNEL), Processor::InSmm),
            (cpu(|cpu| cpu.hflags = 1 << 19, PARKED), Processor::InSmm),
            (cpu(|cpu| cpu.hflags = 1 << 21, KERNEL), nested),
            (
                cpu(
                    |cpu| (cpu.hflags, cpu.vm_hsave) = (1 << 21, 1 << 40),
                    KERNEL,
                ),
                nested,
            ),
        ];
        for (cpu, want) in table {
            let got = told(folder.path(), &of(&[KERNEL, cpu]).bytes());
            let all = Processors::Known(vec![super::started(&KERNEL, true), want]);
            assert_eq!(got, all, "{cpu:x?}");
        }
        // The boot processor runs from the reset vector on.
        let got = told(folder.path(), &of(&[NEVER, NEVER]).bytes());
        let first = super::started(&NEVER, true);
        assert_eq!(got, Processors::Known(vec![first, Processor::NotStarted]));
    }

    /// A halted processor in real mode with interrupts off is parked, wherever it is.
    trait Parked {
        fn clone_parked(self) -> (Cpu, Processor);
    }
    impl Parked for (Cpu, Processor) {
        fn clone_parked(self) -> (Cpu, Processor) {
            (self.0, Processor::Parked)
        }
    }

    #[test]
    fn what_contradicts_itself_tells_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let table = [
            // Long mode or protected mode in one place only.
            Cpu {
                hflags: 1 << 14,
                ..PARKED
            },
            Cpu {
                hflags: 1 << 7,
                ..NEVER
            },
            // Waits for a SIPI with a kernel's registers; does what nobody knows.
            Cpu {
                mp_state: 1,
                ..KERNEL
            },
            Cpu {
                mp_state: 2,
                ..PARKED
            },
            Cpu {
                mp_state: 9,
                ..KERNEL
            },
            Cpu {
                halted: 2,
                ..KERNEL
            },
        ];
        for cpu in table {
            let got = told(folder.path(), &of(&[KERNEL, cpu]).bytes());
            assert!(matches!(got, Processors::NotTold(_)), "{cpu:x?}: {got:?}");
        }
    }

    #[test]
    fn sections_that_do_not_go_together_tell_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let fields = cpu_fields(&KERNEL);
        let with = |change: &dyn Fn(&mut Devices)| {
            let mut devices = of(&[KERNEL]);
            change(&mut devices);
            devices.bytes()
        };
        let swapped = (
            fields.0.clone(),
            fields
                .1
                .replace("cr[2]", "cr[9]")
                .replace("cr[3]", "cr[2]")
                .replace("cr[9]", "cr[3]"),
        );
        let cpu = |version: u32, instance: u32, fields: (Vec<u8>, String)| {
            move |devices: &mut Devices| {
                let common =
                    r#""fields":[{"name":"halted","type":"x","size":4},{"name":"r","size":4}]"#;
                devices.add("cpu_common", instance, 1, &[0; 8], common);
                devices.add("cpu", instance, version, &fields.0, &fields.1);
            }
        };
        let table = [
            with(&|devices| devices.cpu(0, &KERNEL, None)),
            with(&|devices| devices.add("cpu", 1, 12, &fields.0, &fields.1)),
            with(&|devices| devices.add("cpu_common", 1, 1, &[], r#""fields":[]"#)),
            with(&cpu(13, 1, fields.clone())),
            with(&cpu(12, 1, swapped)),
            with(&|devices| devices.out.push(0)),
            with(&|devices| devices.out.truncate(devices.out.len() - 1)),
            with(&|devices| devices.described.truncate(1)),
            with(&|devices| devices.described.swap(1, 2)),
            Devices::new().bytes(),
            of(&[]).bytes(),
            of(&[KERNEL]).out,
            b"\0".to_vec(),
            Vec::new(),
        ];
        for (number, devices) in table.iter().enumerate() {
            let got = told(folder.path(), devices);
            assert!(matches!(got, Processors::NotTold(_)), "{number}: {got:?}");
        }
        let all = Processors::Known(vec![started(&KERNEL, true); 2]);
        assert_eq!(told(folder.path(), &with(&cpu(11, 1, fields.clone()))), all);
        // Processors may have been plugged in out of order; padding may follow; old machines write
        // no footers; the state of a virtio-mem device is described, but stands elsewhere.
        assert_eq!(told(folder.path(), &with(&cpu(12, 7, fields))), all);
        let one = Processors::Known(vec![started(&KERNEL, true)]);
        let padded = [of(&[KERNEL]).bytes(), vec![0; 512]].concat();
        assert_eq!(told(folder.path(), &padded), one);
        let mut bare = Devices::new();
        bare.footers = false;
        bare.cpu(0, &KERNEL, None);
        assert_eq!(told(folder.path(), &bare.bytes()), one);
        let mut early = of(&[KERNEL]);
        let device = r#"{"name":"0:2.0/virtio-mem-device-early","instance_id":0,"version":1,"fields":[{"name":"addr","size":8}]}"#;
        early.described.insert(0, device.into());
        assert_eq!(told(folder.path(), &early.bytes()), one);
    }

    #[test]
    fn a_nested_guests_host_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let host = (0x8005_0033, 0xabc_d000, 0x37_2ef0, 0xd01);
        let registers = |efer| ControlRegisters::new(host.0, host.1, host.2, efer);
        let inside = Cpu {
            hflags: 1 << 21,
            ..KERNEL
        };
        const LONG: u32 = 1 << 9;
        const LOAD_EFER: u32 = 1 << 21;
        let mut odd = vmcs12(host, LONG);
        odd[0] ^= 1;
        let table = [
            ("svm", vmcb(host), Some(registers(Some(0xd01)))),
            ("svm", vmcb((host.0, host.1, host.2, 0)), None),
            (
                "vmx",
                vmcs12(host, LONG | LOAD_EFER),
                Some(registers(Some(0xd01))),
            ),
            ("vmx", vmcs12(host, LONG), Some(registers(None))),
            ("vmx", vmcs12(host, LOAD_EFER), None),
            ("vmx", odd, None),
        ];
        for (kind, inner, host) in table {
            let mut devices = Devices::new();
            devices.cpu(0, &inside, Some(&nested(kind, &inner)));
            let got = told(folder.path(), &devices.bytes());
            let want = Processors::Known(vec![Processor::InNestedGuest { host }]);
            assert_eq!(got, want, "{kind}");
        }
        // Under QEMU's own emulation it is in guest memory, here in a page of a stream.
        let page = Cpu {
            vm_hsave: 0x4000,
            ..inside
        };
        let mut devices = Devices::new();
        devices.cpu(0, &page, None);
        let mut file = stream(&devices.bytes());
        let area = file
            .windows(4096)
            .position(|page| page == [5; 4096])
            .unwrap();
        put(&mut file, area, &vmcb(host));
        let got = open(folder.path(), &file).processors();
        let host = Some(registers(Some(0xd01)));
        assert_eq!(
            got,
            Processors::Known(vec![Processor::InNestedGuest { host }])
        );
    }

    /// The states that QEMU wrote behind the memory of real guests, with what it said of their processors.
    #[test]
    fn real_states_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let runs = |cr3, cr4| {
            let (cr0, _, _, efer) = RUNS;
            Processor::Started(ControlRegisters::new(cr0, cr3, cr4, Some(efer)))
        };
        let table: &[(&str, Vec<Processor>)] = &[
            (
                "running",
                vec![
                    runs(RUNNING[0].0, RUNNING[0].1),
                    runs(RUNNING[1].0, RUNNING[1].1),
                ],
            ),
            (
                "nr_cpus",
                vec![runs(NR_CPUS.0, NR_CPUS.1), Processor::Parked],
            ),
            (
                "reset",
                vec![
                    Processor::Started(ControlRegisters::new(0x11, 0, 0, Some(0))),
                    Processor::NotStarted,
                ],
            ),
            // In a guest of KVM's, in QEMU's emulation of SVM; the host's registers are in a page
            // of memory that is not here.
            ("nested", vec![Processor::InNestedGuest { host: None }]),
        ];
        for (name, want) in table {
            let path = data(&format!("devices-{name}"));
            let devices = zstd::decode_all(fs::File::open(path).unwrap()).unwrap();
            assert_eq!(
                told(folder.path(), &devices),
                Processors::Known(want.clone()),
                "{name}"
            );
        }
    }

    /// `CR3` and `CR4`, by `info registers -a`.
    const RUNNING: [(u64, u64); 2] = [(0x601_0000, 0x75_1eb0), (0x105_8000, 0x75_1ea0)];
    const NR_CPUS: (u64, u64) = (0x105_2000, 0x75_1eb0);
}

/// The processors by a VMM's own state go with the memory.
#[test]
fn a_dump_is_told_of_its_processors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("raw");
    fs::write(&path, vec![1; 4096]).unwrap();
    let dump = Dump::open(&path, Some(&LayoutSpec::Flat)).unwrap();
    assert_eq!(dump.processors(), Processors::Unknown);
    let told = Processors::Known(vec![Processor::NotStarted]);
    assert_eq!(dump.with_processors(told.clone()).processors(), told);
    let files = SnapshotFiles::find(&path, None, None).unwrap();
    assert_eq!(*files.processors(), Processors::Unknown);
}

/// A Firecracker folder: the state's registers go with the memory.
#[test]
fn a_firecracker_folder_tells_its_processors() {
    let folder = tempfile::tempdir().unwrap();
    let packed = fs::File::open(data("kvm-bitcode")).unwrap();
    let state = zstd::decode_all(packed).unwrap();
    let magic = 0x0710_1984_8664_0000_u64.to_le_bytes().to_vec();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("vm.mem"), vec![1; 1 << 20]).unwrap();
    for (state, known) in [(state, true), (vec![0; 512], false)] {
        fs::write(at("vm.state"), [magic.clone(), state].concat()).unwrap();
        let files = SnapshotFiles::find(folder.path(), None, None).unwrap();
        match files.processors() {
            Processors::Known(all) => assert!(known && all.len() == 4, "{all:?}"),
            other => assert!(!known && *other == Processors::Unknown, "{other:?}"),
        }
    }
}
