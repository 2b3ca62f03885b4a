//! Reports as text and as Markdown.

use std::path::Path;

use calib::arch::Projection;
use calib::evaluate::{Row, Score};
use calib::stats::LayerStats;

use super::table::{bytes, count, markdown, memory, seconds, table};
use super::{Cost, Report};
use crate::allocate::Substitute;
use crate::allocate::decide::Spent;
use crate::plan::{Substituted, Summary};
use crate::run::{Item, Stage};
use crate::solved::{By, Refit};

type Rows = Vec<Vec<String>>;

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

/// A finished output for a person at a terminal; the last line counts what was not done as asked and says where the output lies.
pub fn text_report(report: &Report, costs: &[(Stage, Cost)], out: &Path) -> String {
    let mut text = heading(report) + "\n\n";
    if let Some(scores) = &report.evaluation {
        text += &table(&score_rows(scores));
        text += &judged(report);
        text.push('\n');
    }
    text += &table(&size_rows(report));
    let shared_out = allocation(&report.plan, table);
    if !shared_out.is_empty() {
        text += &format!("\n{shared_out}");
    }
    if !costs.is_empty() {
        text += &format!("\n{}", table(&cost_rows(costs)));
    }
    text += &routers(report);
    text + &format!("\n{}{}; the result lies in {}\n", exceptions(&report.plan), surprises(report), out.display())
}

/// The same in Markdown, without what depends on the machine.
pub fn markdown_report(report: &Report) -> String {
    let mut text = format!("# {}\n\n", heading(report));
    if let Some(scores) = &report.evaluation {
        text += &(markdown(&score_rows(scores)) + "\n" + &judged(report) + "\n");
    }
    text += &markdown(&size_rows(report));
    let shared_out = allocation(&report.plan, markdown);
    if !shared_out.is_empty() {
        text += &format!("\n{shared_out}");
    }
    text += &routers(report);
    text + &format!("\n{}{}.\n", exceptions(&report.plan), surprises(report))
}

/// What solving met with, where it met with anything: codes that GPTQ did not better, experts that lost their tokens, damping that grew.
fn surprises(report: &Report) -> String {
    let matrices = |n: usize| if n == 1 { "1 matrix".to_owned() } else { format!("{n} matrices") };
    let mut said = String::new();
    for (by, what) in
        [(By::GptqKeptRtn, "kept as rounded because GPTQ lost more"), (By::RtnUnreached, "rounded because no token came any more")]
    {
        if let Some(&n) = report.solved.matrices.get(&by) {
            said += &format!(", {} {what}", matrices(n));
        }
    }
    if let Some((name, damping)) = report.solved.damped.first_key_value() {
        said += &format!(", {} damped more than asked for ({name}: {damping})", matrices(report.solved.damped.len()));
    }
    said
}

/// Which of the outputs the scores are of.
fn judged(report: &Report) -> String {
    match report.evaluated.as_deref() {
        Some(format) if report.outputs.len() > 1 => format!("scores of the output {format}\n"),
        _ => String::new(),
    }
}

/// What became of routers that were fitted; empty where none was.
fn routers(report: &Report) -> String {
    if report.solved.routers.is_empty() {
        return String::new();
    }
    let count = report.solved.routers.len() as f64;
    let mean = |of: fn(&Refit) -> f64| 100.0 * report.solved.routers.values().map(of).sum::<f64>() / count;
    let (before, after) = (mean(|r| r.overlap_before), mean(|r| r.overlap_after));
    format!(
        "\n{} routers were changed: behind compressed layers {before:.2}% of the original's choices of experts were made before, {after:.2}% \
         after.\n",
        report.solved.routers.len()
    )
}

fn heading(report: &Report) -> String {
    let model = &report.model;
    let bits = report.bits_per_weight.map_or("nothing quantized".to_owned(), |bits| format!("quantized to {bits:.3} stored bits a weight"));
    format!("{} ({}, {} parameters, {} active): {bits}", model.name, model.family, count(model.parameters), count(model.active))
}

/// What was not done as asked: experts blended or rounded for want of tokens, dead channels.
fn exceptions(plan: &Summary) -> String {
    let plural = |n: usize, one: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") };
    format!(
        "for want of tokens {} blended with the layer's and {} rounded to nearest, {} left as rounded",
        plural(plan.blended_experts, "expert"),
        plural(plan.rounded_experts, "expert"),
        plural(plan.dead_channels, "dead input channel")
    )
}

fn size_rows(report: &Report) -> Rows {
    let plan = &report.plan;
    let mut rows = vec![row(["", "before", "after"])];
    let quantized = format!("{} quantized matrices", plan.matrices);
    rows.push(vec![quantized, bytes(plan.bytes_before), bytes(plan.bytes_after)]);
    rows.extend(plan.substituted.iter().map(substituted));
    rows.push(vec!["everything else".to_owned(), bytes(plan.bytes_kept), bytes(plan.bytes_kept)]);
    if let Some((before, after, by)) = &plan.experts {
        rows.push(vec![format!("routed experts a layer ({by})"), before.to_string(), after.to_string()]);
    }
    for output in &report.outputs {
        rows.push(vec![format!("weight files, {} ({})", output.format, output.folder), bytes(report.model.bytes), bytes(output.bytes)]);
    }
    rows
}

/// Experts that were dropped: what they were, and what is stored in their place.
fn substituted(dropped: &Substituted) -> Vec<String> {
    let count: usize = dropped.experts.values().sum();
    let experts = if count == 1 { "1 dropped expert".to_owned() } else { format!("{count} dropped experts") };
    vec![experts, bytes(dropped.bytes_before), bytes(dropped.bytes_after)]
}

fn cost_rows(costs: &[(Stage, Cost)]) -> Rows {
    let known = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let mut rows = vec![row(["stage", "wall", "CPU", "peak memory"])];
    for (stage, cost) in costs {
        let (cpu, peak) = (cost.cpu_seconds.map(seconds), cost.peak_bytes.map(memory));
        rows.push(vec![stage.name().to_owned(), seconds(cost.wall_seconds), known(cpu), known(peak)]);
    }
    let wall = costs.iter().map(|(_, cost)| cost.wall_seconds).sum();
    let cpu = costs.iter().map(|(_, cost)| cost.cpu_seconds).sum::<Option<f64>>();
    let peak = costs.iter().filter_map(|(_, cost)| cost.peak_bytes).max();
    rows.push(vec!["all".to_owned(), seconds(wall), known(cpu.map(seconds)), known(peak.map(memory))]);
    rows
}

/// Scores for a person: with a reference before and after, KL and top-1, else perplexity alone.
pub fn evaluation(report: &calib::evaluate::Report) -> String {
    table(&score_rows(report))
}

fn score_rows(report: &calib::evaluate::Report) -> Rows {
    let heading = match report.all.divergence {
        Some(_) => row(["text", "tokens", "perplexity before", "after", "KL (nats)", "±", "top-1"]),
        None => row(["text", "tokens", "perplexity"]),
    };
    let line = |name: &str, score: &Score| {
        let mut cells = vec![name.to_owned(), score.tokens.to_string()];
        match &score.divergence {
            Some(d) => {
                cells.extend([d.reference_perplexity, score.perplexity].map(|ppl| format!("{ppl:.4}")));
                cells.extend([d.kl, d.kl_se].map(|kl| format!("{kl:.5}")));
                cells.push(format!("{:.2}%", d.top1 * 100.0));
            }
            None => cells.push(format!("{:.4}", score.perplexity)),
        }
        cells
    };
    let texts = report.texts.iter().map(|Row { domain, score }| line(domain, score));
    std::iter::once(heading).chain(texts).chain([line("all", &report.all)]).collect()
}

/// How a budget was shared out; empty where one width was given to all.
fn allocation(plan: &Summary, form: fn(&[Vec<String>]) -> String) -> String {
    let Some(account) = &plan.allocation else { return String::new() };
    let mut rows = vec![row(["matrices", "width", "count"])];
    for (kind, widths) in &plan.widths {
        rows.extend(widths.iter().map(|(width, count)| vec![kind.clone(), width.clone(), count.to_string()]));
    }
    let loads = account.runtime.map_or("every matrix free".to_owned(), |runtime| format!("ties of {}", runtime.name()));
    let mut text = format!(
        "{}\nAllocated by {} ({loads}, {} classes): {} of {} spent; predicted loss {:.6}, at most {:.1e} above the best possible{}, {:.3e} saved by one byte more; \
         native's widths would predict {:.6} (granularity gap {:+.1}%), free ones {:.6}\n",
        form(&rows),
        account.cost,
        account.classes,
        bytes(account.bytes),
        bytes(account.budget),
        account.loss,
        account.gap(),
        if account.proven { " (proven optimal)" } else { "" },
        account.price,
        account.loss_native,
        100.0 * account.granularity_gap(),
        account.loss_free,
    );
    if let Some(dropped) = account.dropped {
        let whole = account.loss_whole.map_or("does not fit".to_owned(), |loss| format!("would predict {loss:.6}"));
        text += &format!("{dropped} experts dropped; keeping all of them in the same bytes {whole}\n");
    }
    if let Some(Substituted { by, experts, bytes_after, .. }) = &plan.substituted {
        let list: Vec<String> = experts.iter().map(|(layer, count)| format!("layer {layer}: {count}")).collect();
        let by = match by {
            Substitute::Mean => "their mean",
            Substitute::Zero => "nothing",
        };
        text += &format!("dropped experts put out {by} ({}): {}\n", bytes(*bytes_after), list.join(", "));
    }
    for Spent { what, most, spent, price } in &account.beside {
        text += &format!("{what}: {spent:.6} of {most:.6} spent, {price:.3e} saved by one more\n");
    }
    text
}

/// A plan in numbers.
pub fn plan(summary: &Summary, path: &Path) -> String {
    let stored = summary.bits_per_weight().map_or(String::new(), |bits| format!("{bits:.3}"));
    let mut rows = vec![
        row(["", "tensors", "before", "after", "bits a weight"]),
        vec!["quantized".to_owned(), summary.matrices.to_string(), bytes(summary.bytes_before), bytes(summary.bytes_after), stored],
        vec!["kept".to_owned(), summary.kept.to_string(), bytes(summary.bytes_kept), bytes(summary.bytes_kept)],
        vec!["dropped".to_owned(), summary.dropped.to_string(), bytes(summary.bytes_dropped), bytes(0)],
    ];
    if let Some(dropped) = &summary.substituted {
        let tensors = Projection::ALL.len() * dropped.experts.values().sum::<usize>();
        let [before, after] = [dropped.bytes_before, dropped.bytes_after].map(bytes);
        rows.push(vec!["dropped experts".to_owned(), tensors.to_string(), before, after]);
    }
    let excluded = match summary.excluded {
        0 => String::new(),
        n => format!("{n} of the kept matrices are named in allocate.exclude\n"),
    };
    let shared_out = match allocation(summary, table) {
        text if text.is_empty() => text,
        text => format!("\n{text}"),
    };
    table(&rows) + &excluded + &shared_out + &format!("\n{}; the plan lies in {}\n", exceptions(summary), path.display())
}

/// What the stages will take.
pub fn estimate(items: &[Item]) -> String {
    let mut rows = vec![row(["on this machine", "about"])];
    rows.extend(items.iter().map(|item| vec![item.what.to_owned(), seconds(item.seconds)]));
    rows.push(vec!["all".to_owned(), seconds(items.iter().map(|item| item.seconds).sum())]);
    table(&rows)
}

/// How many tokens reached the experts of each layer.
pub fn coverage(layers: &[LayerStats], tokens: usize) -> String {
    let mut rows = vec![row(["layer", "experts", "fewest tokens", "median", "most", "unreached"])];
    for (layer, stats) in layers.iter().enumerate() {
        let Some(router) = stats.experts.as_ref().map(|experts| &experts.router) else { continue };
        let mut reached: Vec<u64> = router.counts.columns().into_iter().map(|column| column.sum()).collect();
        reached.sort_unstable();
        let (Some(fewest), Some(most)) = (reached.first(), reached.last()) else { continue };
        let unreached = reached.iter().filter(|count| **count == 0).count();
        let cells = [layer, reached.len()].map(|n| n.to_string()).into_iter();
        let cells = cells.chain([*fewest, reached[reached.len() / 2], *most].map(|n| n.to_string()));
        rows.push(cells.chain([unreached.to_string()]).collect());
    }
    format!("Of {tokens} tokens each expert was given:\n\n{}", table(&rows))
}
