// The entry points of the core, one table per instruction set.
#pragma once

#include "problem.h"
#include "scratch.h"
#include "thread_pool.h"

namespace attnrb {

struct Kernels {
  const char* name;  // "portable", "avx2", "avx512", "avx512_bf16", "amx"; "neon", "neon_bf16"
  Status (*attention)(const AttentionProblem&, const ThreadPool&, Scratch&);
  void (*received_attention)(const ReceivedProblem&, const ThreadPool&, Scratch&);
  Status (*gradient)(const GradientProblem&, const ThreadPool&, Scratch&);
  void (*outlier_mask)(const OutlierMaskProblem&, const ThreadPool&);
  void (*rebalance)(const RebalanceProblem&, const ThreadPool&);
  void (*rebalance_gradient)(const RebalanceGradientProblem&, const ThreadPool&);
};

// The best table that this processor runs, or the one that the environment variable ATTNRB_CPU names (lower only).
// Chosen at the first call. Throws std::invalid_argument when the variable names nothing this machine can run.
const Kernels& kernels();

// The table called `name`, or null when this build or this processor lacks it. For tests and benches.
const Kernels* find_kernels(const char* name);

// Null-terminated list of the tables that this processor can run, lowest first.
const char* const* available_kernels();

}  // namespace attnrb
