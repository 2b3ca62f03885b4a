//! The curve of budgets: as a table, as CSV, as a picture.

use std::path::Path;

use plotters::prelude::*;

use super::table::{bytes, table};
use crate::allocate::Account;
use crate::plan::{Point, Sweep};
use crate::run::Compared;
use crate::{Error, Result};

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

/// A sweep for a person at a terminal.
pub fn sweep(sweep: &Sweep, dir: &Path) -> String {
    let mut rows = vec![row(["asked", "bits a weight", "bytes", "predicted loss", "gap", "saved by a byte", "against native", "free"])];
    for Point { asked, bits, account } in &sweep.points {
        rows.push(vec![
            format!("{asked:.3}"),
            format!("{bits:.3}"),
            bytes(account.bytes),
            format!("{:.6}", account.loss),
            format!("{:.1e}", account.gap()),
            format!("{:.3e}", account.price),
            format!("{:+.1}%", 100.0 * account.granularity_gap()),
            format!("{:.6}", account.loss_free),
        ]);
    }
    let refused = sweep.refused.as_ref().map_or(String::new(), |(asked, why)| {
        let asked: Vec<String> = asked.iter().map(|bits| format!("{bits:.3}")).collect();
        format!("\nnot possible: {}; {why}\n", asked.join(", "))
    });
    let cost = sweep.points.first().map_or("", |point| point.account.cost.as_str());
    format!("{}{refused}\nlosses by {cost}; the curve lies in {}\n", table(&rows), dir.join("pareto.svg").display())
}

/// The same as CSV, numbers in full.
pub fn csv(points: &[Point]) -> String {
    let mut text = "asked,bits,bytes,cost,loss,bound,price,proven,loss_native,loss_free\n".to_owned();
    for Point { asked, bits, account: a } in points {
        let cells = [
            format!("{asked}"),
            format!("{bits}"),
            a.bytes.to_string(),
            a.cost.clone(),
            format!("{:e}", a.loss),
            format!("{:e}", a.bound),
            format!("{:e}", a.price),
            a.proven.to_string(),
            format!("{:e}", a.loss_native),
            format!("{:e}", a.loss_free),
        ];
        text += &(cells.join(",") + "\n");
    }
    text
}

/// Predicted loss over bits a weight, on a logarithmic scale, with the bound and with free widths; measured points where there are any.
///
/// # Errors
///
/// [`Error::Stage`] where the file cannot be drawn.
pub fn svg(points: &[Point], measured: &[Compared], path: &Path) -> Result<()> {
    let failed = |what: String| Error::Stage { path: path.to_owned(), what };
    let values = |p: &Point| [p.account.loss, p.account.bound, p.account.loss_free];
    let all: Vec<f64> = points.iter().flat_map(values).chain(measured.iter().map(|m| m.kl)).filter(|y| *y > 0.0).collect();
    let (low, high) = (all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(0.0, f64::max));
    if all.is_empty() {
        return Err(failed("there is no loss above zero to draw".into()));
    }
    let ends = |f: fn(f64, f64) -> f64, start: f64| points.iter().map(|p| p.bits).chain(measured.iter().map(|m| m.bits)).fold(start, f);
    let (left, right) = (ends(f64::min, f64::INFINITY), ends(f64::max, 0.0));
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (840, 520)).into_drawing_area();
        let draw = || -> std::result::Result<(), DrawingAreaErrorKind<std::io::Error>> {
            root.fill(&WHITE)?;
            let cost = points.first().map_or("", |p| p.account.cost.as_str());
            let mut chart = ChartBuilder::on(&root)
                .margin(16)
                .x_label_area_size(40)
                .y_label_area_size(72)
                .caption(format!("predicted loss ({cost}) over stored bits a weight"), ("sans-serif", 18))
                .build_cartesian_2d(left..right.max(left + 0.01), (low / 1.5..high * 1.5).log_scale())?;
            chart.configure_mesh().x_desc("stored bits a weight").y_desc("loss").y_label_formatter(&|y| format!("{y:.1e}")).draw()?;
            let gray = RGBColor(160, 160, 160);
            let line = |value: fn(&Account) -> f64| points.iter().map(move |p| (p.bits, value(&p.account))).filter(|(_, y)| *y > 0.0);
            for (name, color, line) in [("predicted", BLUE, line(|a| a.loss)), ("free widths", gray, line(|a| a.loss_free))] {
                let drawn = chart.draw_series(LineSeries::new(line, color.stroke_width(2)))?;
                drawn.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
            }
            if !measured.is_empty() {
                let dots = measured.iter().filter(|m| m.kl > 0.0).map(|m| Circle::new((m.bits, m.kl), 4, RED.filled()));
                let drawn = chart.draw_series(dots)?;
                drawn.label("measured KL").legend(|(x, y)| Circle::new((x + 9, y), 4, RED.filled()));
            }
            chart.configure_series_labels().background_style(WHITE.filled()).border_style(BLACK).draw()?;
            root.present()
        };
        draw().map_err(|error| failed(error.to_string()))?;
    }
    crate::tensorfile::write_whole(path, text.as_bytes())
}

/// Predicted against measured.
pub fn compared(points: &[Compared]) -> String {
    let mut rows = vec![row(["bits a weight", "predicted loss", "measured KL", "±", "measured / predicted"])];
    for point in points {
        rows.push(vec![
            format!("{:.3}", point.bits),
            format!("{:.6}", point.predicted),
            format!("{:.6}", point.kl),
            format!("{:.6}", point.kl_se),
            format!("{:.3}", point.ratio()),
        ]);
    }
    table(&rows)
}

/// The same as CSV.
pub fn compared_csv(points: &[Compared]) -> String {
    let line = |p: &Compared| format!("{},{:e},{:e},{:e}\n", p.bits, p.predicted, p.kl, p.kl_se);
    std::iter::once("bits,predicted,kl,kl_se\n".to_owned()).chain(points.iter().map(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(bits: f64, loss: f64) -> Point {
        let account = Account {
            cost: "end_loss".into(),
            runtime: None,
            budget: 100,
            bytes: 90,
            classes: 2,
            loss,
            bound: loss / 2.0,
            price: 1e-3,
            proven: true,
            loss_free: loss / 2.0,
            loss_native: loss / 2.0,
            dropped: None,
            loss_whole: None,
            beside: Vec::new(),
        };
        Point { asked: bits, bits, account }
    }

    #[test]
    fn a_sweep_as_table_csv_and_picture() {
        let points = vec![point(2.0, 0.5), point(3.0, 0.125)];
        let text = sweep(&Sweep { points: points.clone(), refused: Some((vec![1.5], "too small".into())) }, Path::new("d"));
        assert!(text.contains("+100.0%") && text.contains("not possible: 1.500; too small"), "{text}");
        assert_eq!(csv(&points).lines().nth(1), Some("2,2,90,end_loss,5e-1,2.5e-1,1e-3,true,2.5e-1,2.5e-1"));
        let measured = [Compared { bits: 2.0, predicted: 0.5, kl: 0.75, kl_se: 0.01 }];
        assert!(compared(&measured).contains("1.500"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.svg");
        svg(&points, &measured, &path).unwrap();
        let drawn = fs_err::read_to_string(&path).unwrap();
        assert!(drawn.starts_with("<svg") && drawn.contains("measured KL") && drawn.matches("<polyline").count() >= 2, "{drawn}");
        assert!(svg(&[], &[], &path).unwrap_err().to_string().contains("no loss above zero"));
    }
}
