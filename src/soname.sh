#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# soname.sh NAME COMPILER...: which file a program linked with -lNAME would load.
name=$1
shift
objdump -p "$("$@" "-print-file-name=lib$name.so")" | sed -n 's/^ *SONAME *//p' | grep .
