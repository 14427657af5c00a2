// fastllm._cuda: Python's doors into the CUDA kernels. The doors of each op stand in bind_<op>.cpp.
#include "bindings.h"

namespace fastllm::cuda {

void bind_attention(py::module_& m);
void bind_gated_activation(py::module_& m);
void bind_quant_matmul(py::module_& m);
void bind_rms_norm(py::module_& m);
void bind_rotary(py::module_& m);

Place place_of(const TensorView& x) {
  Place place;
  place.device = x.device_index;
#ifndef FASTLLM_SIMT
  constexpr int kCuda = 2;  // DLPack's number
  FASTLLM_CHECK(!x.on_cpu, "fastllm: a tensor is on the CPU, expected a CUDA device");
  void* stream = nullptr;
  const auto* api = Boundary::get().api;
  if (api != nullptr && api->current_stream != nullptr) {
    if (api->current_stream(kCuda, x.device_index, &stream) != 0) throw py::error_already_set();
  } else {
    const py::object current = py::module_::import("torch").attr("cuda").attr("current_stream")(x.device_index);
    stream = reinterpret_cast<void*>(current.attr("cuda_stream").cast<uintptr_t>());
  }
  place.stream = static_cast<cudaStream_t>(stream);
#endif
  return place;
}

Int8Output int8_output(const char* name, const TensorView& data, const TensorView& groups, int64_t rows, int64_t K,
                       int64_t group_size) {
  FASTLLM_CHECK(group_size == 32 || group_size == 64 || group_size == 128, name, ": group_size is ", group_size,
                ", expected 32, 64 or 128");
  Int8Output to{};
  to.num_groups = static_cast<int>((K + group_size - 1) / group_size);
  FASTLLM_CHECK(data.dtype == DType::i8 && data.contiguous_from(0) && data.numel() == rows * K, name,
                ": data must be int8, contiguous and as large as the result");
  FASTLLM_CHECK(groups.dtype == DType::f32 && groups.contiguous_from(0) && groups.numel() == rows * to.num_groups * 2,
                name, ": groups must be fp32, contiguous, ", to.num_groups, " pairs for each row");
  to.data = data.as<int8_t>();
  to.groups = groups.as<float>();
  to.group_log2 = group_size == 32 ? 5 : group_size == 64 ? 6 : 7;
  return to;
}

namespace {

#ifdef FASTLLM_SIMT

py::dict device_facts() { return py::dict(py::arg("executor") = true); }

#else

// What this machine's driver says; a sentence where there is none.
py::dict device_facts() {
  int driver = 0, runtime = 0, devices = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  py::dict facts(py::arg("executor") = false, py::arg("runtime") = runtime, py::arg("driver") = driver);
  if (driver == 0) {
    facts["why"] = "no CUDA driver is installed";
  } else if (const cudaError_t status = cudaGetDeviceCount(&devices); status != cudaSuccess) {
    cudaGetLastError();
    facts["why"] = std::string("the CUDA driver says: ") + cudaGetErrorString(status);
  }
  facts["devices"] = devices;
  return facts;
}

#endif

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastllm's CUDA kernels.";
  Boundary::get().initialise();
  m.def("device_facts", &device_facts, "what the driver says: versions, number of devices, and why there are none");
  // Compute capabilities that the kernels were compiled for, "80 90a 120+PTX"; "" for the executor.
  m.attr("architectures") = FASTLLM_CUDA_ARCHS;
#ifdef FASTLLM_SIMT
  m.def("seed", &simt::seed, "the order of threads, blocks and copies from the next launch on");
  m.def("use_capability", &use_capability, "80 or 90: the GPU that launches are chosen for from now on");
  m.def("launches", [] {
    py::dict all;
    for (const auto& [name, seen] : simt::launches()) {
      all[name.c_str()] = py::dict(py::arg("count") = seen.count, py::arg("blocks") = seen.blocks,
                                   py::arg("threads") = seen.threads, py::arg("shared_bytes") = seen.shared_bytes);
    }
    return all;
  });
#endif
  bind_attention(m);
  bind_gated_activation(m);
  bind_quant_matmul(m);
  bind_rms_norm(m);
  bind_rotary(m);
}

}  // namespace fastllm::cuda
