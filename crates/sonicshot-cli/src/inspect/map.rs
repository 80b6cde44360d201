//! RAM drawn by class: in the terminal, and as a picture.
//!
//! Both draw the same grid. A cell stands for as many frames as make the grid small enough, and
//! shows the class that most of them have.

use crate::report::{bytes_of, count, percent, say_styled, size};
use anstream::{AutoStream, ColorChoice};
use sonicshot::{ClassCounts, PageClass, PageMap, PfnRange, PrunePlan, Tally, to_u64, to_usize};
use std::fmt::Write as _;
use std::io::{self, Write};

/// Cells in a line of the terminal, which has 80 columns: an address of 13 and a space stand before.
const LINE: u64 = 64;
/// Lines that a terminal shows at once.
const LINES: u64 = 32;
/// Cells in a line of a picture.
const PICTURE_LINE: u64 = 128;
/// Lines of a picture: with every cell another class than the one before it, two grids of this
/// size take less than 400 KB.
const PICTURE_LINES: u64 = 128;
/// The width and height of a picture's cell, in pixels.
const CELL: u64 = 4;

/// The drawing of a class: a letter, a number of the terminal's 256 colours, and a picture's colour.
const fn look(class: PageClass) -> (char, u8, &'static str) {
    match class {
        PageClass::FreeBuddy => ('.', 250, "#e3e8ec"),
        PageClass::FreePcp => (',', 247, "#cfd6dc"),
        PageClass::Offline => ('o', 244, "#b4bec7"),
        PageClass::Absent => ('-', 240, "#ffffff"),
        PageClass::Anonymous => ('a', 33, "#2f7fd1"),
        PageClass::Shmem => ('m', 39, "#6fb2ec"),
        PageClass::Hugetlb => ('H', 27, "#1b4f8f"),
        PageClass::HugetlbFree => ('h', 75, "#a3c4e8"),
        PageClass::PageCacheClean => ('c', 71, "#58a65c"),
        PageClass::PageCacheDirty => ('d', 28, "#25703a"),
        PageClass::Kernel => ('k', 202, "#e0622d"),
        PageClass::Slab => ('s', 214, "#f0a03c"),
        PageClass::PageTable => ('t', 160, "#b3261e"),
        PageClass::Reserved => ('r', 97, "#8a5fa8"),
        PageClass::Unaccepted => ('u', 102, "#8b8f94"),
        PageClass::HwPoison => ('!', 196, "#ff0000"),
        PageClass::Hole => ('_', 236, "#4a4f54"),
        // Of a class that this crate does not know nothing is known.
        _ => ('?', 229, "#e8d44d"),
    }
}

/// The content of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// Frames of a class that stay.
    Kept(PageClass),
    /// Frames that a prune leaves out.
    Dropped,
}

/// A piece of RAM without holes, in cells.
#[derive(Debug)]
struct Block {
    /// The frames of the block.
    frames: PfnRange,
    cells: Vec<Shown>,
}

/// RAM by class, and what of it is left out: by a prune, or of a checkpoint.
pub(super) struct Drawing<'a> {
    pub pages: &'a PageMap,
    pub counts: &'a ClassCounts,
    /// The number of these frames that are left out.
    pub gone: &'a dyn Fn(PfnRange) -> u64,
    /// The number of all frames that are left out.
    pub gone_pages: u64,
    /// The state in which they are gone: "after a prune", "in the checkpoint".
    pub left_by: &'static str,
}

/// RAM in cells of the same number of frames.
#[derive(Debug)]
struct Grid {
    frames_in_cell: u64,
    blocks: Vec<Block>,
}

impl Grid {
    /// Draws `pages` in at most about `cells` cells, and which of them are left out by `gone`.
    fn new(pages: &PageMap, gone: &dyn Fn(PfnRange) -> u64, cells: u64) -> Self {
        let wanted = pages.total().div_ceil(cells.max(1)).max(1);
        let frames_in_cell = wanted.checked_next_power_of_two().unwrap_or(wanted);
        let mut blocks = Vec::new();
        for region in pages.ram() {
            blocks.push(Block {
                frames: *region,
                cells: cells_of(pages, gone, *region, frames_in_cell),
            });
        }
        Self {
            frames_in_cell,
            blocks,
        }
    }
}

/// The class of most frames of each cell of `region`.
fn cells_of(
    pages: &PageMap,
    gone: &dyn Fn(PfnRange) -> u64,
    region: PfnRange,
    frames_in_cell: u64,
) -> Vec<Shown> {
    let mut cells = Vec::new();
    let mut at = region.start();
    while at < region.end() {
        let end = at.checked_add(frames_in_cell).unwrap_or(region.end());
        let cell = PfnRange::new(at, end.min(region.end()));
        cells.push(most(pages, gone, cell));
        at = cell.end();
    }
    cells
}

/// The class of most frames of `cell`.
fn most(pages: &PageMap, gone: &dyn Fn(PfnRange) -> u64, cell: PfnRange) -> Shown {
    let mut counts: Vec<(PageClass, Tally)> = Vec::new();
    for (frames, class) in pages.runs_in(cell) {
        match counts.iter_mut().find(|(known, _)| *known == class) {
            Some((_, frames_of)) => frames_of.add(frames.len()),
            None => counts.push((class, Tally::new(frames.len()))),
        }
    }
    let class = counts.iter().max_by_key(|(_, frames)| *frames);
    match class {
        _ if gone(cell) > cell.len() / 2 => Shown::Dropped,
        Some((class, _)) => Shown::Kept(*class),
        None => Shown::Kept(PageClass::Unknown),
    }
}

/// None of them.
const NONE_GONE: &dyn Fn(PfnRange) -> u64 = &|_| 0;

/// The number of frames of `cell` that go by a plan.
pub(super) fn dropped_frames(plan: &PrunePlan, cell: PfnRange, pages: &PageMap) -> u64 {
    let size = pages.page_size();
    let Some(range) = cell.gpa_range(size) else {
        return 0;
    };
    let bytes: u64 = plan.dropped_in(range).map(|gone| gone.len()).sum();
    bytes / size.bytes()
}

/// Prints RAM by class, before a prune, and after it where that differs.
pub(super) fn print(drawing: &Drawing<'_>) {
    let pages = drawing.pages;
    let cells = LINE * LINES;
    let grid = Grid::new(pages, NONE_GONE, cells);
    let coloured = AutoStream::choice(&io::stdout()) != ColorChoice::Never;
    let bytes = |frames: u64| bytes_of(frames, pages.page_size().bytes());
    say_styled!("");
    say_styled!(
        "map       a character is {} ({} pages): what most of them are",
        size(bytes(grid.frames_in_cell)),
        count(grid.frames_in_cell)
    );
    print_grid(&grid, pages, coloured);
    say_styled!("");
    print_legend(drawing.counts, coloured);
    say_styled!("");
    say_styled!("{}, what is left out blank:", drawing.left_by);
    print_grid(&Grid::new(pages, drawing.gone, cells), pages, coloured);
    print_blocks(pages, coloured);
}

fn print_grid(grid: &Grid, pages: &PageMap, coloured: bool) {
    for block in &grid.blocks {
        let mut at = block.frames.start().gpa(pages.page_size());
        let in_cell = bytes_of(grid.frames_in_cell, pages.page_size().bytes());
        let line = to_usize(LINE);
        for cells in block.cells.chunks(line) {
            let mut drawn = String::new();
            let mut colour = None;
            for cell in cells {
                let (letter, number) = match cell {
                    Shown::Dropped => (' ', None),
                    Shown::Kept(class) => (look(*class).0, Some(look(*class).1)),
                };
                if coloured && number != colour {
                    // Writing into memory does not fail.
                    let _ = match number {
                        Some(number) => write!(drawn, "\x1b[38;5;{number}m"),
                        None => write!(drawn, "\x1b[0m"),
                    };
                    colour = number;
                }
                drawn.push(letter);
            }
            if colour.is_some() {
                drawn.push_str("\x1b[0m");
            }
            let address = at.map_or_else(String::new, |at| format!("{:#x}", at.raw()));
            say_styled!("{address:>13} {drawn}");
            let shown = to_u64(cells.len()).checked_mul(in_cell);
            at = at.and_then(|at| at.checked_add(shown?));
        }
    }
}

/// The letters of the classes that there are.
fn print_legend(counts: &ClassCounts, coloured: bool) {
    let mut line = String::from("         ");
    for (class, _) in counts.iter() {
        let (letter, number, _) = look(class);
        let entry = format!(" {letter} {}", class.name());
        if line.len() + entry.len() > 79 {
            say_styled!("{line}");
            line = String::from("         ");
        }
        let _ = match coloured {
            true => write!(line, " \x1b[38;5;{number}m{letter}\x1b[0m {}", class.name()),
            false => write!(line, "{entry}"),
        };
    }
    say_styled!("{line}");
}

/// Free memory by the largest aligned blocks that it can be cut into, as a buddy allocator would.
fn free_blocks(pages: &PageMap) -> Vec<u64> {
    let mut orders = vec![0_u64; ORDERS];
    for (frames, class) in pages.runs() {
        if class != PageClass::FreeBuddy {
            continue;
        }
        let (mut at, end) = (frames.start().raw(), frames.end().raw());
        while let Some(left @ 1..) = end.checked_sub(at) {
            let aligned = at.trailing_zeros();
            let order = aligned.min(left.ilog2()).min(LAST_ORDER);
            if let Some(blocks) = usize::try_from(order)
                .ok()
                .and_then(|at| orders.get_mut(at))
            {
                *blocks += 1;
            }
            let Some(next) = at.checked_add(1 << order) else {
                break;
            };
            at = next;
        }
    }
    orders
}

/// `MAX_ORDER` of x86-64, where a block has 4 MiB at most.
const LAST_ORDER: u32 = 10;
const ORDERS: usize = 11;

/// Free blocks of an order.
struct OfOrder {
    /// The bytes of one.
    block: u64,
    blocks: u64,
    /// The frames of all of them.
    frames: u64,
}

/// Free memory by order, and how many frames that is; none if nothing is free.
fn by_order(pages: &PageMap) -> Option<(Vec<OfOrder>, u64)> {
    let page = pages.page_size().bytes();
    let of = |(blocks, order): (u64, u32)| OfOrder {
        block: bytes_of(page, 1 << order),
        blocks,
        frames: bytes_of(blocks, 1 << order),
    };
    let orders: Vec<_> = free_blocks(pages).into_iter().zip(0..).map(of).collect();
    let total = orders.iter().map(|order| order.frames).sum();
    (total > 0).then_some((orders, total))
}

/// The length of a bar for `part`, where all of `longest` takes `whole`: at least one for anything.
fn bar(part: u64, longest: u64, whole: u64) -> u64 {
    let length = u128::from(part) * u128::from(whole);
    let length = length.div_ceil(u128::from(longest.max(1)));
    u64::try_from(length).unwrap_or(whole)
}

/// The longest bar of the terminal: the columns that a line of 79 has left.
const BAR: u64 = 33;

fn print_blocks(pages: &PageMap, coloured: bool) {
    let Some((orders, total)) = by_order(pages) else {
        return;
    };
    let page = pages.page_size().bytes();
    let longest = orders.iter().map(|order| order.frames).max();
    let (start, end) = match coloured {
        true => (
            format!("\x1b[38;5;{}m", look(PageClass::FreeBuddy).1),
            "\x1b[0m",
        ),
        false => (String::new(), ""),
    };
    say_styled!("");
    say_styled!("free blocks by size, aligned:");
    for order in &orders {
        let length = bar(order.frames, longest.unwrap_or(total), BAR);
        let line = format!(
            "{:>9} {:>12} {:>12} {:>8} {start}{}{end}",
            size(order.block),
            count(order.blocks),
            size(bytes_of(order.frames, page)),
            percent(order.frames, total),
            "#".repeat(to_usize(length)),
        );
        say_styled!("{}", line.trim_end());
    }
}

/// Writes the picture: RAM by class before a prune, and what is left behind it.
///
/// # Errors
/// The error of writing to `out`.
pub(super) fn write_svg(drawing: &Drawing<'_>, title: &str, out: &mut dyn Write) -> io::Result<()> {
    let pages = drawing.pages;
    let cells = PICTURE_LINE * PICTURE_LINES;
    let before = Grid::new(pages, NONE_GONE, cells);
    let after = Grid::new(pages, drawing.gone, cells);
    let lines = lines_of(&before);
    let panel = PICTURE_LINE * CELL;
    let (top, gap) = (64, 24);
    let legend = LEGEND * to_u64(drawing.counts.iter().count());
    let blocks = by_order(pages).map_or(0, |(orders, _)| LEGEND * (to_u64(orders.len()) + 2));
    let height = (legend + blocks).max(lines * CELL) + top + 16;
    let width = panel * 2 + gap * 3 + 240;
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"14\">"
    )?;
    writeln!(
        out,
        "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>"
    )?;
    writeln!(
        out,
        "<text x=\"{gap}\" y=\"24\" font-size=\"16\">{}</text>",
        escaped(title)
    )?;
    let ram = size(bytes_of(pages.total(), pages.page_size().bytes()));
    let gone = size(bytes_of(drawing.gone_pages, pages.page_size().bytes()));
    let second = panel + gap * 2;
    let share = percent(drawing.gone_pages, pages.total());
    writeln!(
        out,
        "<text x=\"{gap}\" y=\"50\">{ram} of RAM by class</text>"
    )?;
    writeln!(
        out,
        "<text x=\"{second}\" y=\"50\">{}: {gone} ({share}) less</text>",
        drawing.left_by
    )?;
    write_grid(&before, gap, top, out)?;
    write_grid(&after, second, top, out)?;
    let beside = second + panel + gap;
    write_legend(drawing, beside, top, out)?;
    write_blocks(pages, beside, top + legend, out)?;
    writeln!(out, "</svg>")
}

/// The height of a line beside a picture's grids, in pixels.
const LEGEND: u64 = 24;
/// The widest bar of a picture: what its text beside leaves.
const WIDEST: u64 = 80;

/// The number of lines that a grid takes in a picture.
fn lines_of(grid: &Grid) -> u64 {
    let lines = |block: &Block| to_u64(block.cells.len()).div_ceil(PICTURE_LINE);
    let gaps = to_u64(grid.blocks.iter().skip(1).count());
    grid.blocks.iter().map(lines).sum::<u64>() + gaps
}

/// Writes a path for each class: its cells as lines as thick as a cell is high.
fn write_grid(grid: &Grid, x: u64, y: u64, out: &mut dyn Write) -> io::Result<()> {
    let mut paths: Vec<(PageClass, String)> = Vec::new();
    let mut line = 0_u64;
    let in_line = to_usize(PICTURE_LINE);
    for block in &grid.blocks {
        for cells in block.cells.chunks(in_line) {
            let mut column = 0_u64;
            for run in cells.chunk_by(|one, next| one == next) {
                if let Some(Shown::Kept(class)) = run.first().copied() {
                    let path = path_of(&mut paths, class);
                    // Writing into memory does not fail.
                    let _ = write!(path, "M{column} {line}h{}", run.len());
                }
                column += to_u64(run.len());
            }
            line += 1;
        }
        // A hole in the address space is a line without cells.
        line += 1;
    }
    writeln!(
        out,
        "<g transform=\"translate({x} {}) scale({CELL})\" fill=\"none\">",
        y + CELL / 2
    )?;
    for (class, path) in paths {
        let colour = look(class).2;
        writeln!(out, "<path stroke=\"{colour}\" d=\"{path}\"/>")?;
    }
    writeln!(out, "</g>")
}

fn path_of(paths: &mut Vec<(PageClass, String)>, class: PageClass) -> &mut String {
    let at = match paths.iter().position(|(known, _)| *known == class) {
        Some(at) => at,
        None => {
            paths.push((class, String::new()));
            paths.len() - 1
        }
    };
    #[expect(clippy::indexing_slicing, reason = "found or just put there")]
    &mut paths[at].1
}

fn write_legend(drawing: &Drawing<'_>, x: u64, y: u64, out: &mut dyn Write) -> io::Result<()> {
    let page = drawing.pages.page_size().bytes();
    let mut at = y;
    for (class, frames) in drawing.counts.iter() {
        let text = at + 11;
        writeln!(
            out,
            "<rect x=\"{x}\" y=\"{at}\" width=\"14\" height=\"14\" fill=\"{}\" stroke=\"#808080\"/>\
             <text x=\"{}\" y=\"{text}\">{} {}</text>",
            look(class).2,
            x + 22,
            class.name(),
            size(bytes_of(frames, page))
        )?;
        at += LEGEND;
    }
    Ok(())
}

/// Writes free memory by order: a bar for each, as long as its share.
fn write_blocks(pages: &PageMap, x: u64, y: u64, out: &mut dyn Write) -> io::Result<()> {
    let Some((orders, total)) = by_order(pages) else {
        return Ok(());
    };
    let page = pages.page_size().bytes();
    let longest = orders.iter().map(|order| order.frames).max();
    let text = y + LEGEND + 11;
    writeln!(
        out,
        "<text x=\"{x}\" y=\"{text}\">free blocks by size</text>"
    )?;
    let mut at = y + LEGEND * 2;
    for order in &orders {
        let text = at + 11;
        let width = bar(order.frames, longest.unwrap_or(total), WIDEST);
        let (label, free) = (size(order.block), size(bytes_of(order.frames, page)));
        writeln!(
            out,
            "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{label}</text>\
             <rect x=\"{}\" y=\"{at}\" width=\"{width}\" height=\"14\" fill=\"{}\" stroke=\"#808080\"/>\
             <text x=\"{}\" y=\"{text}\">{free}</text>",
            x + 64,
            x + 72,
            look(PageClass::FreeBuddy).2,
            x + 78 + width
        )?;
        at += LEGEND;
    }
    Ok(())
}

/// Text as XML takes it.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML has no others below a space.
            '\0'..='\x1f' => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{
        Grid, NONE_GONE, PICTURE_LINE, PICTURE_LINES, Shown, bar, escaped, free_blocks,
        write_blocks, write_grid,
    };
    use sonicshot::{Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange, RamLayout};

    fn map(frames: u64) -> PageMap {
        let ram = GpaRange::new(Gpa::new(0), Gpa::new(frames * 4096));
        PageMap::new(
            &RamLayout::new(vec![ram]).unwrap(),
            PageSize::new(4096).unwrap(),
        )
    }

    fn frames(from: u64, to: u64) -> PfnRange {
        PfnRange::new(Pfn::new(from), Pfn::new(to))
    }

    #[test]
    fn a_cell_shows_what_most_of_it_is() {
        let mut pages = map(64);
        pages.set(frames(0, 9), PageClass::Slab);
        pages.set(frames(9, 16), PageClass::Kernel);
        pages.set(frames(16, 64), PageClass::FreeBuddy);
        let grid = Grid::new(&pages, NONE_GONE, 4);
        assert_eq!(grid.frames_in_cell, 16);
        let free = Shown::Kept(PageClass::FreeBuddy);
        let [block] = &grid.blocks[..] else {
            panic!("{grid:?}")
        };
        assert_eq!(
            block.cells,
            [Shown::Kept(PageClass::Slab), free, free, free]
        );
    }

    #[test]
    fn free_memory_is_cut_into_aligned_blocks() {
        let mut pages = map(4096);
        pages.set(frames(1, 8), PageClass::FreeBuddy);
        pages.set(frames(1024, 3072), PageClass::FreeBuddy);
        assert_eq!(free_blocks(&pages), [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2]);
    }

    #[test]
    fn bars_are_as_long_as_their_share() {
        assert_eq!(bar(0, 8, 33), 0);
        assert_eq!(bar(1, u64::MAX, 33), 1);
        assert_eq!(bar(4, 8, 32), 16);
        assert_eq!(bar(u64::MAX, u64::MAX, 33), 33);
        let drawn = |pages: &PageMap| {
            let mut out = Vec::new();
            write_blocks(pages, 0, 0, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let mut pages = map(4096);
        assert_eq!(drawn(&pages), "");
        // Half of it in a block of four pages, half in two of two.
        pages.set(frames(4, 8), PageClass::FreeBuddy);
        pages.set(frames(10, 12), PageClass::FreeBuddy);
        pages.set(frames(14, 16), PageClass::FreeBuddy);
        let widths: Vec<_> = drawn(&pages)
            .lines()
            .skip(1)
            .map(|line| {
                line.split("width=\"")
                    .nth(1)
                    .unwrap()
                    .split('"')
                    .next()
                    .unwrap()
                    .to_owned()
            })
            .collect();
        assert_eq!(
            widths,
            ["0", "80", "80", "0", "0", "0", "0", "0", "0", "0", "0"]
        );
    }

    /// Of 1 TiB in which no two neighbours are the same, a picture stays below 1 MB.
    #[test]
    fn a_picture_of_a_tebibyte_is_small() {
        let mut pages = map(1 << 28);
        let cell = (1 << 28) / (PICTURE_LINE * PICTURE_LINES);
        for number in 0..PICTURE_LINE * PICTURE_LINES {
            let class = PageClass::ALL[usize::try_from(number).unwrap() % 15 + 1];
            pages.set(frames(number * cell, (number + 1) * cell), class);
        }
        let grid = Grid::new(&pages, NONE_GONE, PICTURE_LINE * PICTURE_LINES);
        let mut out = Vec::new();
        write_grid(&grid, 0, 0, &mut out).unwrap();
        assert!(out.len() < 500_000, "{}", out.len());
        assert!(out.len() > 100_000, "{}", out.len());
    }

    #[test]
    fn names_do_not_break_a_picture() {
        assert_eq!(escaped("a<b>&\"\x01"), "a&lt;b&gt;&amp;&quot;\u{fffd}");
    }
}
