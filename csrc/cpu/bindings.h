// What every bind_<op>.cpp needs. Bindings are compiled at the baseline.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../tensor_caster.h"
#include "isa.h"

namespace fastllm::cpu {

namespace py = pybind11;

// The kernel calls of one stretch of Python, to be made again without Python: a decode step calls the same kernels on
// the same memory every time, and reads what changes (ids, positions, lengths) from that memory.
struct Recording {
  struct Call {
    const char* kernel;  // as declare_rungs names it
    std::function<void()> run;
  };
  std::vector<Call> calls;
  KeptTensors kept;  // what crossed the boundary meanwhile

  void start(const py::object& lasts) {
    kept.lasts = lasts;
    active() = this;
    keep_alive() = &kept;
  }
  static void stop() {
    active() = nullptr;
    keep_alive() = nullptr;
  }
  static Recording*& active() {
    static thread_local Recording* recording = nullptr;
    return recording;
  }
};

// What an op's door does last: runs the kernel without Python's lock, and writes the call down if this thread records.
// `call` owns its arguments and what scratch memory it needs.
template <typename Call>
void launch(const char* kernel, Call call) {
  if (Recording* recording = Recording::active()) recording->calls.push_back({kernel, call});
  py::gil_scoped_release release;
  call();
}

// Where the scales and sums of an int8 result y (..., K) go: (..., G, 2).
inline float* int8_groups(const char* op, const TensorView& y, const TensorView& groups, int64_t group_size) {
  FASTLLM_CHECK(group_size == 32 || group_size == 64 || group_size == 128, op, ": group_size is ", group_size,
                ", expected 32, 64 or 128");
  const int64_t K = y.size(-1), rows = K ? y.numel() / K : 0, num_groups = (K + group_size - 1) / group_size;
  FASTLLM_CHECK(y.dtype == DType::i8 && groups.dtype == DType::f32 && groups.contiguous_from(0) &&
                    groups.numel() == rows * num_groups * 2,
                op, ": y must be int8, and groups contiguous float32 (..., ", num_groups, ", 2)");
  return groups.as<float>();
}

// Which entry points exist: `module.kernels["rms_norm"]()` names the rung that would serve now.
template <typename Args>
void declare_rungs(py::module_& m, const char* kernel, const KernelTable<Args>& table) {
  py::dict kernels = m.attr("kernels");
  kernels[kernel] = py::cpp_function([&table] { return kIsaNames[static_cast<int>(table.rung())]; });
}

}  // namespace fastllm::cpu
