# Sourced with the name of an extra: makes .venv and installs this package with the extra into it, once.
extra="$1"
stamp=".venv/specdec-$extra-$(cat pyproject.toml constraints/cpu.txt | sha256sum | cut -c1-16)"
if [ ! -f "$stamp" ]; then
  [ -d .venv ] || { echo "Making the environment .venv"; python3 -m venv .venv; }
  if command -v nvidia-smi > /dev/null 2>&1; then
    echo "Installing torch for CUDA and specdec-lab[$extra] (some minutes)"
    .venv/bin/pip install -q -e ".[$extra]"
  else
    echo "Installing torch for the CPU and specdec-lab[$extra] (some minutes)"
    .venv/bin/pip install -q -r constraints/cpu.txt
    .venv/bin/pip install -q -c constraints/cpu.txt -e ".[$extra]"
  fi
  touch "$stamp"
fi
