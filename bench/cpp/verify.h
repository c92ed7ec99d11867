// Nothing is timed whose output was not compared with the oracle first.
#pragma once

#include <benchmark/benchmark.h>

#include <string>

#include "cases.h"
#include "core/kernels.h"

namespace attnrb::bench {

// Compares rows spread over everything that the kernels wrote last with the oracle. Empty, or what is wrong.
std::string verify_attention(const Kernels& kernels, testing::AttentionCase& attention,
                             const AttentionProblem& problem);

// How far from the truth these kernels may be.
bool close(const Kernels& kernels, double got, double expected, double tolerance, double tile_tolerance);

// Leaves a bench out of the timing, and makes the program end with an error.
void refuse(benchmark::State& state, const std::string& reason);
bool any_refused();

}  // namespace attnrb::bench
