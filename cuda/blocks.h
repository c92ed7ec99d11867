// Keys in blocks: their tables and their writer; the rules are those of launch.h.
#pragma once

#include "kernels/parameters.h"

namespace attnrb::cuda {

// Fills in the numbers of the sequences: see kernels/tables.h. There is at least one sequence.
void start_tables(const TableParameters& parameters, void* stream);

// Slots are on the device; those outside the pools are left out.
void start_write_keys(const WriteProblem& problem, void* stream);

}  // namespace attnrb::cuda
