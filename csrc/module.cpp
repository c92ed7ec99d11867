// The module attnrb._C: how the native library was built and what it runs on. The ops themselves are
// torch.ops.attnrb.*. _C.pyi declares it for type checkers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "core/outliers.h"
#include "runtime.h"

namespace py = pybind11;

namespace {

py::dict build_options() {
  py::dict options;
  options["compiler"] = ATTNRB_COMPILER;
  options["build_type"] = ATTNRB_BUILD_TYPE;
  options["instruction_sets"] = py::str(ATTNRB_INSTRUCTION_SETS).attr("split")();
  options["cuda"] = ATTNRB_CUDA_VERSION;
  options["cuda_targets"] = py::str(ATTNRB_CUDA_TARGETS).attr("split")();
  options["torch_headers"] = ATTNRB_TORCH_HEADERS;
  options["torch_target"] = ATTNRB_TORCH_TARGET;
  return options;
}

int64_t outlier_capacity(double threshold) {
  if (!(threshold > 0.0 && threshold < 1.0))
    throw std::invalid_argument("threshold: expected a number in (0, 1), got " + std::to_string(threshold));
  return attnrb::outlier_capacity(threshold);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "How the native library of attnrb was built, and what it runs on.";
  module.attr("version") = ATTNRB_VERSION;
  module.def(
      "build_options", &build_options,
      "Compiler, build type, instruction sets built, nvcc and what it built for (empty without the CUDA ops), torch "
      "whose headers were used, oldest torch served.");
  module.def("instruction_set", &attnrb::runtime::instruction_set,
             "The instruction set in use: the best one, or the one that the environment variable ATTNRB_CPU names.");
  module.def("instruction_sets", &attnrb::runtime::instruction_sets,
             "The instruction sets that this processor can run, lowest first.");
  module.def("outlier_capacity", &outlier_capacity, py::arg("threshold"),
             "The most outliers a row can have: ceil(1 / threshold) - 1.");
  module.def("scratch_bytes", &attnrb::runtime::scratch_bytes, "Bytes of working memory kept for the next call.");
  module.def("release_scratch", &attnrb::runtime::release_scratch, "Frees the working memory kept for the next call.");
}
