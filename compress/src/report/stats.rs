//! What a folder of statistics says of a model's experts: who saw how many tokens, of which domain.

use std::fmt::Write as _;

use calib::stats::{Coverage, ExpertStats, Manifest, Part, Store, imbalance};
use serde::Serialize;

use super::table::table;
use crate::Result;

/// A folder of statistics.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StatsReport {
    /// Version of this form.
    pub schema: u32,
    /// Fingerprint of the model that was measured.
    pub model: String,
    /// The passes that were added up.
    pub parts: Vec<Part>,
    /// Tokens over all of them.
    pub tokens: u64,
    /// Layers with experts.
    pub layers: Vec<LayerReport>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// All domains together.
    #[serde(flatten)]
    pub coverage: Coverage,
    /// Experts that a token chooses.
    pub top_k: u64,
    /// Each domain of its own.
    pub domains: Vec<DomainReport>,
}

/// One domain in one layer; sums over its tokens, `[experts]` each.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DomainReport {
    /// Its name.
    pub domain: String,
    /// Tokens that were routed.
    pub routed: u64,
    /// Tokens of each expert.
    pub tokens: Vec<u64>,
    /// Standard deviation of the experts' shares.
    pub imbalance: f64,
    /// Experts without a token.
    pub dead: usize,
    /// Raw logits of the chosen.
    pub logits: Vec<f64>,
    /// Their probability under the softmax over all experts.
    pub mass: Vec<f64>,
    /// Their final routing weight.
    pub weights: Vec<f64>,
    /// EASY-EP's importance.
    pub importance: Vec<f64>,
}

/// Reads a finished folder of statistics.
///
/// # Errors
///
/// An IO error, or a file that is not one of these.
pub fn read_stats(store: &Store, manifest: &Manifest) -> Result<StatsReport> {
    let mut layers = Vec::new();
    for layer in 0..manifest.layers {
        if let Some(experts) = store.get(layer)?.experts {
            layers.push(layer_report(layer, &experts, &manifest.domains));
        }
    }
    let tokens = manifest.parts.iter().map(|part| part.tokens_run as u64).sum();
    Ok(StatsReport { schema: 1, model: manifest.model.clone(), parts: manifest.parts.clone(), tokens, layers })
}

fn layer_report(layer: usize, experts: &ExpertStats, names: &[String]) -> LayerReport {
    let router = &experts.router;
    let domain = |(d, name): (usize, &String)| {
        let tokens = router.counts.row(d).to_vec();
        DomainReport {
            domain: name.clone(),
            routed: router.tokens[d],
            imbalance: imbalance(&tokens),
            dead: tokens.iter().filter(|n| **n == 0).count(),
            tokens,
            logits: router.logits.row(d).to_vec(),
            mass: router.mass.row(d).to_vec(),
            weights: router.weights.row(d).to_vec(),
            importance: experts.outputs.importance.row(d).to_vec(),
        }
    };
    LayerReport {
        coverage: Coverage::of(layer, router, experts.outputs.outputs.ncols()),
        top_k: router.counts.sum() / router.tokens.sum().max(1),
        domains: names.iter().enumerate().map(domain).collect(),
    }
}

/// How an expert's tokens compare with an even share, in factors of two; the last stands for all above.
const SHADES: [(char, f64, &str); 8] = [
    ('!', 0.0, "none"),
    ('.', 0.125, "< 1/8"),
    (':', 0.25, "< 1/4"),
    ('-', 0.5, "< 1/2"),
    ('=', 1.0, "< 1"),
    ('+', 2.0, "< 2"),
    ('*', 4.0, "< 4"),
    ('#', f64::INFINITY, "4 and more"),
];

/// Experts a line of the heat map.
const LINE: usize = 64;

fn shade(tokens: u64, even: f64) -> usize {
    let share = if even > 0.0 { tokens as f64 / even } else { 0.0 };
    if tokens == 0 { 0 } else { SHADES.iter().skip(1).position(|(_, below, _)| share < *below).map_or(SHADES.len() - 1, |i| i + 1) }
}

fn even(layer: &LayerReport) -> f64 {
    let tokens = &layer.coverage.tokens;
    tokens.iter().sum::<u64>() as f64 / tokens.len().max(1) as f64
}

/// Heat map, tables by layer and by domain, for a person.
pub fn stats_text(report: &StatsReport) -> String {
    let mut text = String::new();
    for part in &report.parts {
        let _ = writeln!(
            text,
            "{} samples of {} tokens by {} (seed {}), {:.12}",
            part.samples, part.tokens, part.sampler, part.seed, part.corpus
        );
    }
    if report.layers.is_empty() {
        return text + "no layer has experts\n";
    }
    let _ = writeln!(text, "\nTokens of each expert against an even share, layer by layer:\n");
    for layer in &report.layers {
        let shades: Vec<char> = layer.coverage.tokens.iter().map(|&n| SHADES[shade(n, even(layer))].0).collect();
        for (i, line) in shades.chunks(LINE).enumerate() {
            let name = if i == 0 { layer.coverage.layer.to_string() } else { String::new() };
            let _ = writeln!(text, "{name:>5}  {}", line.iter().collect::<String>());
        }
    }
    let legend: Vec<String> = SHADES.iter().map(|(shade, _, means)| format!("{shade} {means}")).collect();
    let _ = writeln!(text, "\n       {}\n", legend.join("   "));
    text += &table(&layer_rows(report));
    text.push('\n');
    text += &table(&domain_rows(report));
    let sum = |of: fn(&Coverage) -> usize| report.layers.iter().map(|layer| of(&layer.coverage)).sum::<usize>();
    let experts: usize = report.layers.iter().map(|layer| layer.coverage.tokens.len()).sum();
    let (dead, starved) = (sum(|c| c.dead), sum(|c| c.starved));
    text + &format!("\nof {experts} experts {dead} saw no token and {starved} fewer than they have inputs, of {} tokens\n", report.tokens)
}

fn layer_rows(report: &StatsReport) -> Vec<Vec<String>> {
    let head = ["layer", "experts", "fewest tokens", "median", "most", "even share", "imbalance", "dead", "starved"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for layer in &report.layers {
        let c = &layer.coverage;
        let mut row: Vec<String> = [c.layer as u64, c.tokens.len() as u64, c.least, c.median, c.most].map(|n| n.to_string()).to_vec();
        row.extend([format!("{:.1}", even(layer)), format!("{:.5}", c.imbalance), c.dead.to_string(), c.starved.to_string()]);
        rows.push(row);
    }
    rows
}

/// One line a domain: its tokens, and over all layers its experts without a token, with the mean and the largest imbalance.
fn domain_rows(report: &StatsReport) -> Vec<Vec<String>> {
    let mut rows = vec![["domain", "tokens", "dead experts", "imbalance, mean", "largest"].map(str::to_owned).to_vec()];
    let domains = report.layers.first().map_or(0, |layer| layer.domains.len());
    for d in 0..domains {
        let all: Vec<&DomainReport> = report.layers.iter().map(|layer| &layer.domains[d]).collect();
        let (mean, most) = all.iter().fold((0.0, 0.0_f64), |(sum, most), of| (sum + of.imbalance, most.max(of.imbalance)));
        let dead: usize = all.iter().map(|of| of.dead).sum();
        let mut row = vec![all[0].domain.clone(), all[0].routed.to_string(), dead.to_string()];
        row.extend([mean / all.len() as f64, most].map(|x| format!("{x:.5}")));
        rows.push(row);
    }
    rows
}

/// One line a layer, expert and domain.
pub fn stats_csv(report: &StatsReport) -> String {
    let mut text = String::from("layer,expert,domain,tokens,logits,mass,weights,importance\n");
    for layer in &report.layers {
        for expert in 0..layer.coverage.tokens.len() {
            for of in &layer.domains {
                let name =
                    if of.domain.contains([',', '"']) { format!("\"{}\"", of.domain.replace('"', "\"\"")) } else { of.domain.clone() };
                let sums = [&of.logits, &of.mass, &of.weights, &of.importance].map(|sums| sums[expert].to_string());
                let _ = writeln!(text, "{},{expert},{name},{},{}", layer.coverage.layer, of.tokens[expert], sums.join(","));
            }
        }
    }
    text
}

/// Side of a cell, and the margins, in pixels.
const CELL: usize = 12;
const LEFT: usize = 48;
const TOP: usize = 40;
/// White, then from yellow to dark blue; experts without a token are red.
const COLORS: [&str; 8] = ["#d7191c", "#ffffcc", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#0c2c84"];

/// The heat map as SVG: a row a layer, a column an expert, its tokens against an even share.
pub fn stats_svg(report: &StatsReport) -> String {
    let experts = report.layers.iter().map(|layer| layer.coverage.tokens.len()).max().unwrap_or(0);
    let (width, height) = (LEFT + CELL * experts.max(48) + CELL, TOP + CELL * (report.layers.len() + 4));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"10\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"16\" font-size=\"12\">Tokens of each expert against an even share, {} tokens</text>\n\
         <text x=\"{LEFT}\" y=\"32\">expert (column), layer (row)</text>\n",
        report.tokens
    );
    for (row, layer) in report.layers.iter().enumerate() {
        let y = TOP + CELL * row;
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", LEFT - 6, y + CELL - 2, layer.coverage.layer);
        for (expert, &tokens) in layer.coverage.tokens.iter().enumerate() {
            let (x, color) = (LEFT + CELL * expert, COLORS[shade(tokens, even(layer))]);
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" fill=\"{color}\" stroke=\"#888888\" stroke-width=\"0.3\">\
                 <title>layer {}, expert {expert}: {tokens} tokens</title></rect>",
                layer.coverage.layer
            );
        }
    }
    let y = TOP + CELL * (report.layers.len() + 1);
    for (i, ((_, _, means), color)) in SHADES.iter().zip(COLORS).enumerate() {
        let x = LEFT + i * 6 * CELL;
        let means = means.replace('<', "&lt;");
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" fill=\"{color}\" stroke=\"#888888\" stroke-width=\"0.3\"/>"
        );
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\">{means}</text>", x + CELL + 3, y + CELL - 2);
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> StatsReport {
        let of = |name: &str, tokens: &[u64]| DomainReport {
            domain: name.into(),
            routed: tokens.iter().sum(),
            tokens: tokens.to_vec(),
            imbalance: imbalance(tokens),
            dead: tokens.iter().filter(|n| **n == 0).count(),
            logits: vec![0.5; 4],
            mass: vec![0.25; 4],
            weights: vec![1.0; 4],
            importance: vec![2.0; 4],
        };
        let tokens = vec![0, 2, 30, 8];
        let coverage = Coverage { layer: 3, tokens, least: 0, median: 2, most: 30, imbalance: 0.3, dead: 1, starved: 2 };
        let layer = LayerReport { coverage, top_k: 1, domains: vec![of("en", &[0, 1, 20, 8]), of("a,b", &[0, 1, 10, 0])] };
        StatsReport { schema: 1, model: "m".into(), parts: vec![], tokens: 40, layers: vec![layer] }
    }

    #[test]
    fn an_even_share_is_the_measure() {
        // 40 tokens over 4 experts: 10 each.
        assert_eq!([0, 1, 2, 4, 9, 10, 20, 39, 40].map(|n| SHADES[shade(n, 10.0)].0), ['!', '.', ':', '-', '=', '+', '*', '*', '#']);
        assert_eq!(shade(0, 0.0), 0);
        let text = stats_text(&report());
        assert!(text.contains("    3  !:*=\n") && text.contains("1 saw no token and 2 fewer than they have inputs, of 40"), "{text}");
    }

    #[test]
    fn a_domain_with_a_comma_stays_one_cell() {
        let csv = stats_csv(&report());
        assert_eq!(csv.lines().count(), 1 + 4 * 2);
        assert!(csv.contains("\n3,2,en,20,0.5,0.25,1,2\n3,2,\"a,b\",10,0.5,0.25,1,2\n"), "{csv}");
    }

    #[test]
    fn every_expert_is_a_cell() {
        let svg = stats_svg(&report());
        assert_eq!(svg.matches("<title>").count(), 4);
        assert!(svg.contains("layer 3, expert 2: 30 tokens") && svg.ends_with("</svg>\n") && !svg.contains("< 1"), "{svg}");
    }
}
