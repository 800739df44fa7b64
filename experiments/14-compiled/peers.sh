#!/usr/bin/env bash
# Make the environment of the packages that experiment 14 compares with, under .engines/peers. Safe to run again.
#
#   bash experiments/14-compiled/peers.sh   # 1 GB, a minute or two
#
# Both packages are under Apache 2.0. torch and transformers are the versions of the environment that runs this project.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder="${SPECDEC_ENGINES_DIR:-.engines}/peers"
version() { python -c "import importlib.metadata as m; print(m.version('$1').split('+')[0])"; }
packages=("torch==$(version torch)" "transformers==$(version transformers)" flashspec==0.3.1 economize==0.3.2)
stamp="$folder/made-$(echo "${packages[@]}" | cat - constraints/cpu.txt | sha256sum | cut -c1-16)"
if [ -f "$stamp" ]; then exit 0; fi
echo "Making $folder"
rm -rf "$folder"
python3 -m venv "$folder"
"$folder/bin/pip" install -q -c constraints/cpu.txt "${packages[@]}"
touch "$stamp"
