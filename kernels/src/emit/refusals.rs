//! What the C loader has to refuse: each wrong argument gives its code and a sentence, and nothing is launched.

use std::process::Command;

use super::FileSet;
use super::tests::{case, run, uncompiled, write};

/// A driver that loads anything and counts launches.
const DRIVER: &str = r#"
int launches;
int cuInit(unsigned flags) { return (int)flags; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 9 : which == 76 ? 0 : 2; return device; }
int cuModuleLoadData(void **module, const char *image) { *module = (void *)image; return 0; }
int cuModuleUnload(void *module) { return !module; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)name; return !module; }
int cuLaunchKernel(void) { launches++; return 0; }
"#;

/// Tries one thing after the other, each time everything else being right.
const PROGRAM: &str = r#"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "mq_moe.h"
#include "mq_constants.h"
static char table[2][7 * 32], wrong[7 * 32];
static void said(const char *what, int code) {
    int *launches = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "launches");
    printf("%s: %d, %d launched: %s\n", what, code, *launches, code ? mq_last_error() : "");
    *launches = 0;
}
int main(int argc, char **argv) {
    mq_model *model;
    mq_layer *layer = NULL, *other = NULL;
    mq_projection part[2];
    char *arena = aligned_alloc(256, 1 << 20), *out = aligned_alloc(256, 1 << 20), *space = aligned_alloc(256, 1 << 20);
    if (argc != 3 || mq_open(".", &model)) return puts(mq_last_error());
    for (int i = 0; i < 2; i++) {
        FILE *file = fopen(i ? "down.table" : "gate_up.table", "rb");
        if (fread(table[i], 1, sizeof table[i], file) != sizeof table[i]) return 1;
        part[i] = (mq_projection){arena, (uint64_t)atol(argv[i + 1]), table[i], table[i], 7, 0};
    }
    said("bind", mq_layer_bind(model, &part[0], &part[1], NULL, MQ_BF16, &layer));
#define BIND(WHAT, CHANGE) { mq_projection p = part[1]; memcpy(wrong, table[1], sizeof wrong); p.host_table = wrong; CHANGE; \
    said(WHAT, mq_layer_bind(model, &part[0], &p, NULL, MQ_BF16, &other)); }
    BIND("crooked arena", p.arena = arena + 16)
    BIND("short arena", p.arena_bytes -= 256)
    BIND("no table", p.host_table = NULL)
    BIND("points outside", memset(wrong + 1, 0xff, 2))
    BIND("width", wrong[16] = 7)
    BIND("group", wrong[17] = 7)
    BIND("tiles", wrong[20] = 9)
    BIND("expert", wrong[24] = 7)
    BIND("permutation", memset(wrong + 12, 0, 4))
    BIND("newer flags", wrong[19] = 1)
    BIND("fewer experts", p.entries = 6)
    BIND("too many experts", p.entries = 8)
    said("type", mq_layer_bind(model, &part[0], &part[1], NULL, 2, &other));
    const size_t size = mq_workspace_bytes(3, MQ_TOP_K, 7);
#define FORWARD(WHAT, X, LDX, IDS, BITS, TOP_K, OUT, LDO, TOKENS, SPACE, SIZE) \
    said(WHAT, mq_moe_forward(layer, X, LDX, IDS, BITS, (float *)arena, TOP_K, OUT, LDO, TOKENS, SPACE, SIZE, NULL));
    FORWARD("forward", arena, MQ_HIDDEN, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 3, space, size)
    FORWARD("no token", arena, MQ_HIDDEN, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 0, space, size)
    FORWARD("short workspace", arena, MQ_HIDDEN, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 3, space, size - 1)
    FORWARD("more tokens", arena, MQ_HIDDEN, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 4, space, size)
    FORWARD("crooked workspace", arena, MQ_HIDDEN, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 3, space + 128, size)
    FORWARD("too many tokens", arena, MQ_HIDDEN, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 1 << 24, space, size)
    FORWARD("top_k", arena, MQ_HIDDEN, arena, 64, MQ_TOP_K + 1, out, MQ_HIDDEN, 3, space, size)
    FORWARD("ids", arena, MQ_HIDDEN, arena, 16, MQ_TOP_K, out, MQ_HIDDEN, 3, space, size)
    FORWARD("short rows", arena, MQ_HIDDEN - 2, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 3, space, size)
    FORWARD("odd rows", arena, MQ_HIDDEN + 1, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 3, space, size)
    FORWARD("crooked x", arena + 2, MQ_HIDDEN, arena, 64, MQ_TOP_K, out, MQ_HIDDEN, 3, space, size)
    FORWARD("crooked ids", arena, MQ_HIDDEN, arena + 4, 64, MQ_TOP_K, out, MQ_HIDDEN, 3, space, size)
    FORWARD("no out", arena, MQ_HIDDEN, arena, 64, MQ_TOP_K, NULL, MQ_HIDDEN, 3, space, size)
    said("dequant", mq_dequant(layer, 0, 6, out, MQ_F16, NULL));
    said("dequant elsewhere", mq_dequant(layer, 0, 7, out, MQ_F16, NULL));
    said("dequant crooked", mq_dequant(layer, 1, 0, out + 2, MQ_F16, NULL));
    mq_layer_free(layer);
    mq_close(model);
    return 0;
}
"#;

/// What is tried, the code, launches, and a part of the sentence.
const EXPECTED: [(&str, i32, i32, &str); 30] = [
    ("bind", 0, 0, ""),
    ("crooked arena", 4, 0, "down: the arena is not aligned to 256 bytes"),
    ("short arena", 3, 0, "of an arena of"),
    ("no table", 4, 0, "a table is missing"),
    ("points outside", 3, 0, "down, entry 0: "),
    ("width", 3, 0, "7 bits in groups of 2^5 with flags"),
    ("group", 3, 0, "8 bits in groups of 2^7 with flags"),
    ("tiles", 3, 0, "9 x 1 tiles, not 3 x 1"),
    ("expert", 3, 0, "expert 7 of 7"),
    ("permutation", 3, 0, "are not known to this build"),
    ("newer flags", 3, 0, "are not known to this build"),
    ("fewer experts", 3, 0, "gate_up has 7 experts, down 6"),
    ("too many experts", 3, 0, "8 entries, at most 7"),
    ("type", 5, 0, "activation type 2"),
    ("forward", 0, 4, ""),
    ("no token", 0, 0, ""),
    ("short workspace", 6, 0, "a workspace of"),
    ("more tokens", 6, 0, "a workspace of"),
    ("crooked workspace", 6, 0, "aligned to 256"),
    ("too many tokens", 5, 0, "pairs at most 2^24"),
    ("top_k", 5, 0, "top_k is at most 3"),
    ("ids", 5, 0, "ids of 16 bits"),
    ("short rows", 5, 0, "rows of 158"),
    ("odd rows", 5, 0, "rows of 161"),
    ("crooked x", 4, 0, "not aligned"),
    ("crooked ids", 4, 0, "not aligned"),
    ("no out", 4, 0, "a pointer is null"),
    ("dequant", 0, 1, ""),
    ("dequant elsewhere", 3, 0, "expert 7 is not in this layer"),
    ("dequant crooked", 4, 0, "not aligned to 4 bytes"),
];

#[test]
fn wrong_arguments_get_a_code_and_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let case = case();
    write(dir.path(), &super::emit(&case.model, &uncompiled()).unwrap());
    let mut files = FileSet::new();
    let [gate_up, down] = [0, 1].map(|p| case.model.layers[0].projections[p].1.clone());
    files.insert("gate_up.table".into(), gate_up.table());
    files.insert("down.table".into(), down.table());
    files.insert("cubin/mq_moe.sm_90a.cubin".into(), b"not looked at".to_vec());
    files.insert("libcuda.c".into(), DRIVER.into());
    files.insert("try.c".into(), PROGRAM.into());
    write(dir.path(), &files);
    let cc = |arguments: &[&str]| run(Command::new("cc").current_dir(dir.path()).args(["-D_GNU_SOURCE", "-w"]).args(arguments));
    if cc(&["-shared", "-fPIC", "libcuda.c", "-o", "libcuda.so.1"]).is_none() {
        eprintln!("skipped: no C compiler");
        return;
    }
    cc(&["try.c", "mq_loader.c", "-ldl", "-o", "try"]);
    let sizes = [&gate_up, &down].map(|arena| arena.bytes.to_string());
    let output = Command::new("./try").current_dir(dir.path()).env("LD_LIBRARY_PATH", ".").args(sizes).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), EXPECTED.len(), "{said}");
    for (line, (what, code, launched, part)) in lines.iter().zip(EXPECTED) {
        let rest = line.strip_prefix(&format!("{what}: {code}, {launched} launched: ")).unwrap_or_else(|| panic!("{what}: {code}: {line}"));
        assert!(rest.contains(part) && (code == 0 || !rest.is_empty()), "{line}");
    }
}
