// pybind11 caster: a torch.Tensor becomes a TensorView.
//
// Two ways in. PyTorch >= 2.10 offers DLPack's C exchange API as a capsule on the type: a function pointer that fills a
// DLTensor in tens of nanoseconds without touching a reference count. Older versions are read through the tensor's
// Python attributes, which costs about a microsecond a tensor. Neither needs a torch header. The struct layouts are
// DLPack 1.x's ABI: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace fastllm::dlpack {

struct Device {
  int32_t type;  // 1: CPU, 2: CUDA
  int32_t id;
};
struct DataType {
  uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 6 bool
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace fastllm::dlpack

namespace fastllm {

// Looked up once a process; tests turn it off to exercise the attribute path.
struct Boundary {
  const dlpack::ExchangeApi* api = nullptr;
  PyTypeObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* dtypes[9] = {};  // torch dtype objects, in the order of DType

  static Boundary& get() {
    static Boundary boundary;
    return boundary;
  }

  void initialise() {
    namespace py = pybind11;
    py::module_ torch = py::module_::import("torch");
    py::object type = torch.attr("Tensor");
    tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
    for (int i = 0; i < 9; ++i) dtypes[i] = torch.attr(name(static_cast<DType>(i))).ptr();
    type.release();  // lives as long as torch does
    use_exchange_api(true);
  }

  bool use_exchange_api(bool enabled) {
    namespace py = pybind11;
    api = nullptr;
    py::handle type(reinterpret_cast<PyObject*>(tensor_type));
    if (enabled && py::hasattr(type, "__dlpack_c_exchange_api__")) {
      py::object capsule = type.attr("__dlpack_c_exchange_api__");
      auto* found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (found == nullptr) throw py::error_already_set();
      if (found->version.major == 1) api = found;
    }
    return api != nullptr;
  }

  bool is_tensor(PyObject* object) const { return PyObject_TypeCheck(object, tensor_type); }
};

inline bool view_by_exchange_api(PyObject* object, TensorView& out) {
  dlpack::Tensor t;
  if (Boundary::get().api->tensor_from_py_object(object, &t) != 0) throw pybind11::error_already_set();
  FASTLLM_CHECK(t.ndim <= kMaxDims, "fastllm: a tensor has ", t.ndim, " dimensions, expected at most ", kMaxDims);
  constexpr int kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kBool = 6;
  const int code = t.dtype.code, bits = t.dtype.bits;
  if (code == kFloat && bits == 32)
    out.dtype = DType::f32;
  else if (code == kBfloat && bits == 16)
    out.dtype = DType::bf16;
  else if (code == kFloat && bits == 16)
    out.dtype = DType::f16;
  else if (code == kFloat && bits == 64)
    out.dtype = DType::f64;
  else if (code == kUint && bits == 8)
    out.dtype = DType::u8;
  else if (code == kInt && bits == 8)
    out.dtype = DType::i8;
  else if (code == kInt && bits == 32)
    out.dtype = DType::i32;
  else if (code == kInt && bits == 64)
    out.dtype = DType::i64;
  else if (code == kBool && bits == 8)
    out.dtype = DType::boolean;
  else
    return false;
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  out.on_cpu = t.device.type == 1;
  out.device_index = t.device.id;
  out.ndim = t.ndim;
  for (int i = 0; i < t.ndim; ++i) {
    out.shape[i] = t.shape[i];
    out.strides[i] = t.strides[i];
  }
  return true;
}

inline bool view_by_attributes(PyObject* object, TensorView& out) {
  namespace py = pybind11;
  py::handle t(object);
  py::object dtype = t.attr("dtype");
  int index = 0;
  while (index < 9 && Boundary::get().dtypes[index] != dtype.ptr()) ++index;
  if (index == 9) return false;
  out.dtype = static_cast<DType>(index);
  out.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
  py::object device = t.attr("device");
  out.on_cpu = device.attr("type").cast<std::string>() == "cpu";
  py::object device_index = device.attr("index");
  out.device_index = device_index.is_none() ? 0 : device_index.cast<int>();
  py::tuple shape = t.attr("shape"), strides = t.attr("stride")();
  FASTLLM_CHECK(shape.size() <= kMaxDims, "fastllm: a tensor has ", shape.size(), " dimensions, expected at most ",
                kMaxDims);
  out.ndim = static_cast<int>(shape.size());
  for (int i = 0; i < out.ndim; ++i) {
    out.shape[i] = shape[i].cast<int64_t>();
    out.strides[i] = strides[i].cast<int64_t>();
  }
  return true;
}

}  // namespace fastllm

namespace pybind11::detail {

template <>
struct type_caster<fastllm::TensorView> {
  PYBIND11_TYPE_CASTER(fastllm::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    const auto& boundary = fastllm::Boundary::get();
    if (!boundary.is_tensor(source.ptr())) return false;
    return boundary.api ? fastllm::view_by_exchange_api(source.ptr(), value)
                        : fastllm::view_by_attributes(source.ptr(), value);
  }
};

}  // namespace pybind11::detail
