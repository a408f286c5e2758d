# Sourced by the other scripts of this folder: creates .venv once, installs the project into it, and activates it.
#   install_project ""      what a run needs
#   install_project "dev"   the same and what the tests need
# PYTHON is the interpreter (3.11 or newer; default python3), VENV the folder (default .venv).

install_project() {
    local extras="${1:+[$1]}" venv="${VENV:-.venv}" stamp
    if [ ! -x "$venv/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit("moe needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    stamp="$venv/.installed-${1:-run}-$(sha256sum pyproject.toml | cut -c1-16)"
    if [ ! -e "$stamp" ]; then
        echo "installing into $venv ..."
        python -m pip install --quiet --disable-pip-version-check --editable ".$extras"
        touch "$stamp"
    fi
    if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
        export DS_ACCELERATOR=cpu
    fi
}
