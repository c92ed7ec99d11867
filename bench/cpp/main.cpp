#include <benchmark/benchmark.h>

#include "benches.h"
#include "verify.h"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  attnrb::bench::register_attention();
  attnrb::bench::register_elementwise();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return attnrb::bench::any_refused() ? 1 : 0;
}
