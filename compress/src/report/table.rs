//! Tables of text, and numbers as people read them.

/// Columns: the first to the left, the others to the right, two spaces apart. Rows are ended by a line break.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|row| row.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            line += &if c == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// The same rows in Markdown, the first one as the heading.
pub fn markdown(rows: &[Vec<String>]) -> String {
    let line = |row: &[String]| format!("| {} |\n", row.join(" | "));
    let Some((head, body)) = rows.split_first() else { return String::new() };
    let rule: String = head.iter().enumerate().map(|(i, _)| if i == 0 { "| --- " } else { "| ---: " }).collect();
    line(head) + &rule + "|\n" + &body.iter().map(|row| line(row)).collect::<String>()
}

/// Bytes in decimal units, three digits: `7.75 MB`.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, 1000.0, &["B", "kB", "MB", "GB", "TB"])
}

/// A count in millions and billions, three digits: `3.87 M`.
pub fn count(n: u64) -> String {
    scaled(n as f64, 1000.0, &["", "k", "M", "B", "T"])
}

/// Bytes of memory in binary units: `210 MiB`.
pub fn memory(n: u64) -> String {
    scaled(n as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

/// Seconds: `3.1 s`, `4 min 05 s`, `2 h 03 min`.
pub fn seconds(s: f64) -> String {
    let whole = s.round() as u64;
    match whole {
        0..100 => format!("{s:.1} s"),
        100..6000 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

fn scaled(mut x: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // 999.5 would be written as 1000.
    while x >= 999.5 && unit + 1 < units.len() {
        x /= step;
        unit += 1;
    }
    let digits = match x {
        _ if unit == 0 => 0,
        x if x < 9.995 => 2,
        x if x < 99.95 => 1,
        _ => 0,
    };
    format!("{x:.digits$} {}", units[unit]).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Vec<String>> {
        [["text", "ppl"], ["é", "12.5"], ["code", "7"]].iter().map(|row| row.iter().map(|c| (*c).to_owned()).collect()).collect()
    }

    #[test]
    fn columns_line_up() {
        assert_eq!(table(&rows()), "text   ppl\né     12.5\ncode     7\n");
        assert_eq!(markdown(&rows()), "| text | ppl |\n| --- | ---: |\n| é | 12.5 |\n| code | 7 |\n");
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn three_digits_and_a_unit() {
        let all = [0, 999, 1000, 7_750_000, 99_960, 999_499, 999_500, 1_234_567_890_000].map(bytes);
        assert_eq!(all, ["0 B", "999 B", "1.00 kB", "7.75 MB", "100 kB", "999 kB", "1.00 MB", "1.23 TB"]);
        assert_eq!(count(3_872_128), "3.87 M");
        assert_eq!(count(12), "12");
        assert_eq!(memory(210 << 20), "210 MiB");
        assert_eq!(memory(1000 << 10), "0.98 MiB");
    }

    #[test]
    fn seconds_minutes_hours() {
        assert_eq!([3.12, 99.4, 245.0, 7400.0].map(seconds), ["3.1 s", "99.4 s", "4 min 05 s", "2 h 03 min"]);
    }
}
