//! Second moments that stay on disk serve another plan, without tokens and with the same codes.

use super::*;

fn keeping(model: &Model, how: impl Fn(&str, Role) -> Option<Quantize>) -> Plan {
    Plan { keep_moments: true, ..plan(model, Quantizer::Gptq(gptq::Params::default()), how) }
}

fn with(bits: u8) -> Quantize {
    Quantize { bits, ..four_bits() }
}

#[test]
fn another_width_takes_no_forward_pass() {
    for name in ["qwen3_moe", "deepseek_v2"] {
        let (model, dir, fresh) = (fixture(name), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let ids = samples(&model);
        // Expert 1 of every layer is blended in both plans; layer 0's is one that the rule of the second plan rounds.
        let plan = |bits: u8, rounded: bool| {
            keeping(&model, move |_, role| {
                let solver = match role {
                    Role::Layer(0, Part::Expert(0, _)) if rounded => Who::Rounded { reason: "few".into() },
                    Role::Layer(_, Part::Expert(1, _)) => Who::Blended { tokens: 1, wanted: 9 },
                    _ => Who::Planned,
                };
                Some(Quantize { solver, ..with(bits) })
            })
        };
        solve(&model, &plan(4, false), Some(&ids), dir.path(), Device::Cpu, &Quiet).unwrap();
        fs_err::remove_dir_all(dir.path().join("solved")).unwrap();
        let second = plan(3, true);
        let kept = solve(&model, &second, None, dir.path(), Device::Cpu, &Quiet).unwrap();
        assert_eq!(kept, solve(&model, &second, Some(&ids), fresh.path(), Device::Cpu, &Quiet).unwrap(), "{name}");
        assert_eq!(solved_bytes(dir.path()), solved_bytes(fresh.path()), "{name}");
    }
}

#[test]
fn what_they_cannot_serve_is_measured_again() {
    let (model, dir) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let ids = samples(&model);
    let tokens_of = |plan: &Plan| {
        if dir.path().join("solved").exists() {
            fs_err::remove_dir_all(dir.path().join("solved")).unwrap();
        }
        match solve(&model, plan, None, dir.path(), Device::Cpu, &Quiet) {
            Err(Error::NoSamples) => solve(&model, plan, Some(&ids), dir.path(), Device::Cpu, &Quiet).map(|_| true).unwrap(),
            other => other.map(|_| false).unwrap(),
        }
    };
    let experts = |role: Role| matches!(role, Role::Layer(_, Part::Expert(..)));
    let some = keeping(&model, |_, role| experts(role).then(four_bits));
    let all = keeping(&model, |_, _| Some(four_bits()));
    assert!(tokens_of(&some) && !tokens_of(&some), "the second time they are there");
    assert!(tokens_of(&all), "attention has left none");
    assert!(!tokens_of(&some), "fewer sites than were kept");
    let blended = keeping(&model, |_, role| {
        let solver = if experts(role) { Who::Blended { tokens: 1, wanted: 9 } } else { Who::Planned };
        Some(Quantize { solver, ..four_bits() })
    });
    assert!(tokens_of(&blended), "what was kept is not blended");
    let others = Plan { corpus: Some("other samples".into()), ..blended.clone() };
    assert!(tokens_of(&others) && !tokens_of(&others));
    assert!(tokens_of(&Plan { keep_moments: false, ..others.clone() }), "nothing is read that is not asked for");
    // A file that was cut short is an error that names it, not another model.
    let path = dir.path().join("moments/layer-00000.safetensors");
    let bytes = fs_err::read(&path).unwrap();
    fs_err::write(&path, &bytes[..bytes.len() - 7]).unwrap();
    fs_err::remove_dir_all(dir.path().join("solved")).unwrap();
    let said = solve(&model, &others, None, dir.path(), Device::Cpu, &Quiet).unwrap_err().to_string();
    assert!(said.contains("layer-00000.safetensors") && said.contains("cut short"), "{said}");
}
