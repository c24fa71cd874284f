/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_FORMATS_QCOW2_STREAM_WRITE_H
#define DR_FORMATS_QCOW2_STREAM_WRITE_H

#include "formats/format.h"

extern const struct dr_sequential qcow2_sequential;

#endif
