#!/usr/bin/env bash
# Other people's code on our output: compresses the bundled model by the quick start's recipe, then lets transformers 5.17.0 and
# 4.57.3 load what was exported and compares logits with `moepress eval`. llama.cpp's tools take the importance matrix that
# `moepress imatrix` writes (not with WITH_LLAMACPP=no). Hugging Face's `kernels` loads the project that `moepress emit` writes for it.
#
#     tests/interop/run.sh [PYTEST ARGUMENTS]
#
# Makes its Python environments below target/interop, from PyPI alone (1.5 GB; about three minutes the first time), and builds two of
# llama.cpp's tools there out of the source inside llama-cpp-python. Wants Python 3.11 or later with venv (`PYTHON` names another than
# python3), a C and a C++ compiler, and cargo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target/interop"
work=$(cd "$target/interop" && pwd)
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1

# Runs "$@" to fill $work/NAME unless that was done for the same inputs.
once() {
    local name=$1 stamp
    stamp=$(cat "${@:3}" | sha256sum)
    [ "$(cat "$work/$name.made" 2>/dev/null)" = "$stamp" ] && return
    rm -rf "${work:?}/$name"
    "$2" "$work/$name"
    echo "$stamp" >"$work/$name.made"
}

newest() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or later, $python is older" >&2; exit 1; }
    "$python" -m venv "$1"
    "$1/bin/pip" install -q --no-deps -r tests/interop/requirements.txt
    "$1/bin/python" tests/interop/cpu_torch.py
}

# Borrows torch and the rest from the first.
older() {
    "$python" -m venv "$1"
    "$work/transformers5/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$("$1/bin/python" -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth"
    "$1/bin/pip" install -q --no-deps --ignore-installed -r tests/interop/requirements-transformers4.txt
}

# Two tools of llama.cpp, hardly optimized: they work on 4 million weights, and the compiler is most of the time.
llamacpp() {
    mkdir -p "$1"
    "$python" -m venv "$1/venv"
    "$1/venv/bin/pip" install -q --no-deps cmake==4.4.5 ninja==1.13.2
    "$1/venv/bin/pip" download -q --no-deps --no-binary llama-cpp-python -d "$1" -r tests/interop/requirements-llamacpp.txt
    tar -xzf "$1"/llama_cpp_python-*.tar.gz -C "$1" --wildcards --strip-components=1 '*/vendor/llama.cpp'
    rm "$1"/llama_cpp_python-*.tar.gz
    PATH=$1/venv/bin:$PATH cmake -S "$1/vendor/llama.cpp" -B "$1/vendor/llama.cpp/build" -G Ninja -DCMAKE_BUILD_TYPE=None \
        -DCMAKE_C_FLAGS="-O1" -DCMAKE_CXX_FLAGS="-O0" -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF >"$1/cmake.log" 2>&1
    PATH=$1/venv/bin:$PATH cmake --build "$1/vendor/llama.cpp/build" --target llama-quantize llama-imatrix >"$1/build.log" 2>&1 ||
        { tail -40 "$1/build.log" >&2; return 1; }
}

hub() { "$work/transformers5/bin/pip" install -q --no-deps --target "$1" -r tests/interop/requirements-hub.txt; }

once transformers5 newest tests/interop/requirements.txt tests/interop/cpu_torch.py
once transformers4 older tests/interop/requirements.txt tests/interop/requirements-transformers4.txt
once hub hub tests/interop/requirements-hub.txt
export KERNELS_HUB="$work/hub"

# About three CPU minutes of compiling the first time; WITH_LLAMACPP=no leaves it out, and its tests are skipped aloud.
if [ "${WITH_LLAMACPP:-yes}" = yes ]; then
    once llamacpp llamacpp tests/interop/requirements-llamacpp.txt
    export LLAMA_CPP="$work/llamacpp/vendor/llama.cpp"
fi

cargo build --release --bin moepress --features "${FEATURES:-}"
export MOEPRESS="${work%/interop}/release/moepress"
export MOEPRESS_OUT="$work/quickstart"
rm -rf "$MOEPRESS_OUT"
"$MOEPRESS" run configs/quickstart.toml --out "$MOEPRESS_OUT" --quiet
status=0
for version in transformers5 transformers4; do
    "$work/$version/bin/python" -m pytest -q -p no:cacheprovider tests/interop "$@" || status=1
done
exit $status
