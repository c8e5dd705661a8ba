#!/usr/bin/env bash
# Python 3.12.1, 3.13.0: a name that one comprehension of a function binds is unbound in the next one, which takes it from outside.
#
# Comprehensions are computed within their function since 3.12. In `[x for x in a], [x + b for b in a]` the second x, of the module
# or of a function around, is then looked for among the locals of the function: `UnboundLocalError`. It is mended for names of the
# module in 3.12.4 and 3.13 (gh-118513), and open for names of a function around (gh-156664). Python 3.11 does what is written.
#
# Do instead: another name for what the first one binds.
#
# Seen (x86-64):
#   3.12.1: x of the module: UnboundLocalError; x of a function around: UnboundLocalError
#   3.13.0: x of the module: [6, 7]; x of a function around: UnboundLocalError
set -euo pipefail
"${PYTHON:-python3}" -c "import sys; sys.exit(sys.version_info < (3, 12))" || exit 2
"${PYTHON:-python3}" - <<'EOS'
import platform
import sys

x = 5


def of_the_module(rows):
    return [x for x in rows], [x + row for row in rows]


def of_a_function_around(rows):
    y = 5

    def function(rows):
        return [y for y in rows], [y + row for row in rows]

    return function(rows)


def outcome(function):
    try:
        return str(function([1, 2])[1])
    except UnboundLocalError as error:
        return type(error).__name__


module, around = outcome(of_the_module), outcome(of_a_function_around)
print(f"{platform.python_version()}: x of the module: {module}; x of a function around: {around}")
is_mended = sys.version_info >= (3, 12, 4)
sys.exit(not (around == "UnboundLocalError" and module == ("[6, 7]" if is_mended else "UnboundLocalError")))
EOS
