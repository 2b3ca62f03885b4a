//! The whole curve of budgets from one table: what each number of bits a weight is predicted to lose.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::widths::Prepared;
use super::{Measured, Shape};
use crate::allocate::{Account, Allocate, Undecided};

/// Bits a weight from one number to another, both included: `1.5..8`, `2..4:0.1`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// First.
    pub from: f64,
    /// Last.
    pub to: f64,
    /// Distance of two.
    pub step: f64,
}

impl Range {
    /// Its numbers, rising.
    pub fn points(&self) -> Vec<f64> {
        let steps = ((self.to - self.from) / self.step + 1e-9).floor() as usize;
        (0..=steps).map(|i| self.from + i as f64 * self.step).collect()
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no range of bits a weight; write 1.5..8, or 1.5..8:0.25 with the distance of two points");
        let (ends, step) = text.split_once(':').unwrap_or((text, "0.25"));
        let (from, to) = ends.split_once("..").ok_or_else(wrong)?;
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|x| x.is_finite() && *x > 0.0).ok_or_else(wrong);
        let range = Self { from: number(from)?, to: number(to)?, step: number(step)? };
        if range.to < range.from || (range.to - range.from) / range.step > 10_000.0 { Err(wrong()) } else { Ok(range) }
    }
}

/// One budget of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Bits a weight that were asked for.
    pub asked: f64,
    /// Bits a weight of the widths that were chosen.
    pub bits: f64,
    /// How they were chosen.
    pub account: Account,
}

/// A sweep, and below what it could not go.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// One a budget, rising.
    pub points: Vec<Point>,
    /// Budgets that were too small, and why the last of them was.
    pub refused: Option<(Vec<f64>, String)>,
}

/// Shares out every budget of `range`. A larger budget never predicts more loss: where its program was not solved to the end, the
/// smaller budget's answer is kept if it is better.
///
/// # Errors
///
/// [`Undecided`] where the reason is another than the budget, or no budget was large enough.
pub fn sweep(allocate: &Allocate, shape: &Shape, measured: Option<&Measured>, range: &Range) -> Result<Sweep, Undecided> {
    let prepared = Prepared::new(allocate, shape, measured);
    let weights = prepared.weights() as f64;
    let mut found = Sweep { points: Vec::new(), refused: None };
    let mut last = None;
    for asked in range.points() {
        let budget = (asked * weights / 8.0).floor() as u64;
        match prepared.decide(budget) {
            Ok(decision) => {
                let mut account = decision.account;
                if let Some(Point { account: before, .. }) = found.points.last()
                    && before.loss < account.loss
                {
                    account = Account { budget, bound: account.bound, price: account.price, ..before.clone() };
                }
                found.points.push(Point { asked, bits: account.bytes as f64 * 8.0 / weights, account });
            }
            Err(why @ Undecided::Budget { .. }) => {
                let refused = found.refused.get_or_insert_with(|| (Vec::new(), String::new()));
                refused.0.push(asked);
                refused.1 = why.to_string();
                last = Some(why);
            }
            Err(why) => return Err(why),
        }
    }
    match last {
        Some(why) if found.points.is_empty() => Err(why),
        _ => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_with_both_its_ends() {
        let range: Range = "1.5..2:0.25".parse().unwrap();
        assert_eq!(range.points(), [1.5, 1.75, 2.0]);
        assert_eq!("2..4:0.1".parse::<Range>().unwrap().points().len(), 21);
        assert_eq!("1.5..8".parse::<Range>().unwrap().step, 0.25);
        for wrong in ["1.5", "8..1.5", "a..b", "1..2:0", "-1..2", "1..2:1e-9", "nan..2"] {
            assert!(wrong.parse::<Range>().unwrap_err().contains("write 1.5..8"), "{wrong}");
        }
    }
}
