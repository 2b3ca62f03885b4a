//! What is wrong with PMQ's knobs and with budgets beside that of all bytes.

use super::{Problem, Source};
use crate::allocate::pmq::{Presence, Scope};
use crate::allocate::{Allocate, Cost, Runtime};

/// What is wrong with PMQ's knobs, and what its program cannot do.
pub(super) fn check_pmq(allocate: &Allocate, source: &Source) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |key: &str, message: &str, help: &str| {
        found.push(source.problem(&format!("allocate.{key}"), message.to_owned(), Some(help.to_owned())));
    };
    if allocate.cost != Cost::Pmq {
        if allocate.pmq.is_some() {
            add("pmq", "these knobs are of the cost pmq, and another one is asked for", "say allocate.cost = \"pmq\", or leave them out");
        }
        return found;
    }
    let params = allocate.pmq.unwrap_or_default();
    if params.batch == 0 {
        add("pmq.batch", "a batch of no samples has no norm", "MC-MoE has 8");
    }
    if ![params.alpha, params.beta, params.gamma].iter().all(|x| x.is_finite() && *x >= 0.0) {
        add("pmq", "an exponent is negative or no number", "MC-MoE's code has alpha 1, beta 1.5 and gamma 1");
    }
    if params.scope == Scope::Model && params.presence == Presence::Required && allocate.pmq.is_some() {
        add("pmq.presence", "the presence rule is one a layer, and there is one program over all layers", "say presence = \"free\"");
    }
    if !matches!(allocate.runtime, None | Some(Runtime::Native | Runtime::Transformers4)) {
        add("runtime", "pmq gives every expert a width of its own, and this runtime ties experts", "name native or transformers4");
    }
    if params.scope == Scope::Layer && !(allocate.devices.is_empty() && allocate.speed.is_none()) {
        add("pmq.scope", "a program a layer has one budget", "say scope = \"model\", or leave devices and speed out");
    }
    let bits: Vec<u8> = allocate.options().iter().map(|choice| choice.bits).collect();
    if params.scope == Scope::Layer && params.presence == Presence::Required && !(bits.contains(&2) && bits.contains(&3)) {
        add("choices", "the presence rule wants a width of 2 and one of 3 bits", "say choices = [1, 2, 3], or pmq.presence = \"free\"");
    }
    if !allocate.fill.is_solved() {
        add("fill", "pmq rounds every expert with a quantizer of its own, and nothing is estimated", "leave fill out");
    }
    found
}

/// What is wrong with budgets beside that of all bytes.
pub(super) fn check_beside(allocate: &Allocate, source: &Source) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |key: String, message: String, help: &str| found.push(source.problem(&key, message, Some(help.to_owned())));
    for (i, device) in allocate.devices.iter().enumerate() {
        let [first, last] = device.layers;
        if first > last {
            add(format!("allocate.devices.{i}.layers"), format!("layers {first} to {last} are none"), "write the first and the last layer");
        }
        if let Some(other) = allocate.devices[..i].iter().find(|other| other.layers[0] <= last && first <= other.layers[1]) {
            let message = format!("layers {first} to {last} overlap {} to {}", other.layers[0], other.layers[1]);
            add(format!("allocate.devices.{i}.layers"), message, "a layer lies on one device");
        }
    }
    let Some(speed) = &allocate.speed else { return found };
    if !(speed.seconds_per_token.is_finite() && speed.seconds_per_token > 0.0) {
        let message = format!("{} seconds are no time", speed.seconds_per_token);
        add("allocate.speed.seconds_per_token".to_owned(), message, "ask for some, such as 0.02");
    }
    for (i, kernel) in speed.kernels.iter().enumerate() {
        let time = kernel.nanoseconds_per_million;
        if !(time.is_finite() && time >= 0.0) {
            add(format!("allocate.speed.kernels.{i}"), format!("{time} nanoseconds are no time"), "measure the kernel");
        }
        if speed.kernels[..i].iter().any(|other| other.bits == kernel.bits) {
            add(format!("allocate.speed.kernels.{i}"), format!("{} bits stand there twice", kernel.bits), "leave one of them out");
        }
    }
    let options = allocate.options();
    if let Some(choice) = options.iter().find(|choice| speed.kernels.iter().all(|kernel| kernel.bits != choice.bits)) {
        let message = format!("no kernel of {} bits is in the table, and allocate.choices has {choice}", choice.bits);
        add("allocate.speed.kernels".to_owned(), message, "add one, or take the width out");
    }
    found
}
