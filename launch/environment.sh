# Sourced by the other scripts: a virtual environment in .venv with everything the project needs.
# The environment is made anew only when pyproject.toml or constraints.txt change.
# Usage: prepare_environment EXTRAS    (for example: quickstart, or test)
# ENVIRONMENT=active takes the environment or container at hand as it is; ENVIRONMENT=ready takes .venv as it is. Both
# install nothing. bash launch/environment.sh EXTRAS makes .venv and nothing else.

prepare_environment() {
  local extras=$1 python=${PYTHON:-python3}
  if [ "${ENVIRONMENT:-}" = active ]; then
    python3 -c "import deepspeed, torch, transformers" || {
      echo "ENVIRONMENT=active, and this environment lacks what is named above: pip install -c constraints.txt -e '.[$extras]'" >&2
      return 1
    }
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  elif [ "${ENVIRONMENT:-}" = ready ]; then
    [ -f .venv/.prepared ] || {
      echo "there is no .venv, and nothing is installed here: run 'bash launch/environment.sh $extras' once, or set ENVIRONMENT=active" >&2
      return 1
    }
    export PATH="$PWD/.venv/bin:$PATH"
  else
    make_environment "$extras" "$python"
    export PATH="$PWD/.venv/bin:$PATH"
  fi
  # DeepSpeed compiles its operators here at first use.
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
  if ! nvidia-smi -L >/dev/null 2>&1; then
    # Without a GPU: DeepSpeed's CPU accelerator and gloo, one thread a rank so that ranks do not fight for cores.
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
}

make_environment() {
  local extras=$1 python=$2 stamp
  stamp="$extras $(cat pyproject.toml constraints.txt | cksum)"
  [ "$(cat .venv/.prepared 2>/dev/null)" != "$stamp" ] || return 0
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # torch first and pinned: without it the other packages would pull whatever build is newest.
  .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja
  .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  case "$extras" in *test*)
    # Its pinned requirements (another torch) are not wanted; einops-exts comes with the extra.
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt open-flamingo ;;
  esac
  echo "$stamp" > .venv/.prepared
}

# A TCP port that nothing listens on: two runs on one machine do not meet. MASTER_PORT chooses another.
free_port() {
  echo "${MASTER_PORT:-$(python3 -c 'from ds_lvxattn.training.launch import free_port; print(free_port())')}"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  cd "$(dirname "$0")/.."
  prepare_environment "${1:-quickstart}"
fi
