// What every bind_<op>.cpp needs. Bindings are compiled at the baseline.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "../tensor_caster.h"
#include "isa.h"

namespace fastllm::cpu {

namespace py = pybind11;

// Which entry points exist: `module.kernels["rms_norm"]()` names the rung that would serve now.
template <typename Args>
void declare_rungs(py::module_& m, const char* kernel, const KernelTable<Args>& table) {
  py::dict kernels = m.attr("kernels");
  kernels[kernel] = py::cpp_function([&table] { return kIsaNames[static_cast<int>(table.rung())]; });
}

}  // namespace fastllm::cpu
