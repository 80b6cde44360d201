//! Images of Xen, made by hand.

/// A PV image of one record: pages as they are filled, from frame 0 on.
pub fn image(fills: &[u8]) -> Vec<u8> {
    image_with(fills, &[])
}

/// The same, with page tables of the first level among them.
pub fn image_with(fills: &[u8], tables: &[u64]) -> Vec<u8> {
    let record = |out: &mut Vec<u8>, kind: u32, body: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        out.extend(body);
    };
    let mut out = b"Xen saved domain, xl format\n \0 \r".to_vec();
    out.extend([4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(b"LibxlFmt\0\0\0\x02\0\0\0\0");
    record(&mut out, 1, &[]);
    out.extend([0xff; 8]);
    out.extend(b"XENF\0\0\0\x03\0\0\0\0\0\0\0\0");
    out.extend([1, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
    let mut body = (fills.len() as u64).to_le_bytes().to_vec();
    for pfn in 0..fills.len() as u64 {
        let kind = u64::from(tables.contains(&pfn)) << 60;
        body.extend((pfn | kind).to_le_bytes());
    }
    for fill in fills {
        body.extend([*fill; 4096]);
    }
    record(&mut out, 1, &body);
    record(&mut out, 0, &[]);
    record(&mut out, 0, &[]);
    out
}
