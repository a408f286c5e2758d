# shellcheck shell=bash
# Sourced by the examples that read rows which other people wrote: real_data FILE WHERE_FROM sets `rows` to the file's path.
# It is looked for in MOE_EXAMPLES_DATA (a folder, or the file itself; default ../shared/data).

real_data() {
    rows="${MOE_EXAMPLES_DATA:-../shared/data}"
    if [ ! -f "$rows" ]; then
        rows="$rows/$1"
    fi
    if [ ! -f "$rows" ]; then
        echo "MOE_EXAMPLES_DATA: $rows isn't there; it is $2" >&2
        exit 2
    fi
}
