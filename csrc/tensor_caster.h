// pybind11 caster: a torch.Tensor becomes a TensorView.
//
// Two ways in. PyTorch >= 2.10 offers DLPack's C exchange API as a capsule on the type: a function pointer that fills a
// DLTensor in tens of nanoseconds without touching a reference count. Older versions are read through the tensor's
// Python attributes, which costs about a microsecond a tensor. Neither needs a torch header. The struct layouts are
// DLPack 1.x's ABI: https://dmlc.github.io/dlpack/latest/c_api.html
//
// Whatever has no dense memory of its own (sparse, meta, fake, nested, ...) is a TypeError in words. A tensor's
// negative bit cannot be seen here: the direct door (fastllm/ops/_op.py) keeps such tensors away.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <vector>

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
  PyObject* dtypes[kNumDTypes] = {};  // torch dtype objects, in the order of DType

  static Boundary& get() {
    static Boundary boundary;
    return boundary;
  }

  void initialise() {
    namespace py = pybind11;
    py::module_ torch = py::module_::import("torch");
    // References kept: they live as long as torch does.
    tensor_type = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
    for (int i = 0; i < kNumDTypes; ++i) {
      dtypes[i] = py::object(torch.attr(name(static_cast<DType>(i)))).release().ptr();
    }
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
      if (found->version.major == 1 && found->tensor_from_py_object != nullptr) api = found;
    }
    return api != nullptr;
  }

  bool is_tensor(PyObject* object) const { return PyObject_TypeCheck(object, tensor_type); }
};

// What the error texts say of a tensor: "torch.float32 sparse_coo tensor on cpu".
inline std::string described(PyObject* tensor) {
  const pybind11::handle t(tensor);
  const auto text = [&](const char* attribute) { return pybind11::str(t.attr(attribute)).cast<std::string>(); };
  std::string layout = text("layout");
  return text("dtype") + " " + layout.substr(layout.find('.') + 1) + " tensor on " + text("device");
}

// PyTorch's own sentence, without the C++ stack that some of its messages carry.
inline std::string first_line(const char* message) {
  const char* end = std::strchr(message, '\n');
  return end ? std::string(message, end) : std::string(message);
}

[[noreturn]] inline void refuse_dtype(PyObject* tensor) {
  std::string expected;
  for (int i = 0; i < kNumDTypes; ++i) {
    expected += std::string(i == 0 ? "" : i + 1 < kNumDTypes ? ", " : " or ") + name(static_cast<DType>(i));
  }
  throw pybind11::type_error("fastllm: an argument is a " + described(tensor) + ", expected dtype " + expected);
}

[[noreturn]] inline void refuse_storage(PyObject* tensor, const std::string& because) {
  throw pybind11::type_error("fastllm: an argument is a " + described(tensor) +
                             ", expected a dense tensor with memory of its own, because " + because);
}

inline void check_ndim(int64_t ndim) {
  FASTLLM_CHECK(ndim <= kMaxDims, "fastllm: an argument has ", ndim, " dims, expected at most ", kMaxDims);
}

inline void view_by_exchange_api(PyObject* object, TensorView& out) {
  dlpack::Tensor t;
  if (Boundary::get().api->tensor_from_py_object(object, &t) != 0) {
    pybind11::error_already_set error;  // takes the Python error over
    refuse_storage(object, "PyTorch says: " + first_line(error.what()));
  }
  check_ndim(t.ndim);
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
    refuse_dtype(object);
  out.data = t.data == nullptr ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
  out.on_cpu = t.device.type == 1;
  out.device_index = t.device.id;
  out.ndim = t.ndim;
  int64_t contiguous = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    out.shape[i] = t.shape[i];
    out.strides[i] = t.strides ? t.strides[i] : contiguous;  // DLPack before 1.2: null means contiguous
    contiguous *= t.shape[i];
  }
}

inline void view_by_attributes(PyObject* object, TensorView& out) {
  namespace py = pybind11;
  py::handle t(object);
  py::object dtype = t.attr("dtype");
  int index = 0;
  while (index < kNumDTypes && Boundary::get().dtypes[index] != dtype.ptr()) ++index;
  if (index == kNumDTypes) refuse_dtype(object);
  out.dtype = static_cast<DType>(index);
  py::tuple shape, strides;
  try {
    out.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
    shape = t.attr("shape");
    strides = t.attr("stride")();
  } catch (const py::error_already_set& error) {
    refuse_storage(object, "PyTorch says: " + first_line(error.what()));
  }
  py::object device = t.attr("device");
  out.on_cpu = device.attr("type").cast<std::string>() == "cpu";
  py::object device_index = device.attr("index");
  out.device_index = device_index.is_none() ? 0 : device_index.cast<int>();
  check_ndim(static_cast<int64_t>(shape.size()));
  out.ndim = static_cast<int>(shape.size());
  for (int i = 0; i < out.ndim; ++i) {
    out.shape[i] = shape[i].cast<int64_t>();
    out.strides[i] = strides[i].cast<int64_t>();
  }
}

}  // namespace fastllm

namespace fastllm {

// While a thread records kernel calls, every tensor that crosses is kept alive here: the calls point into it. Not those
// whose memory outlives them, if `lasts` says so of their address.
struct KeptTensors {
  std::vector<pybind11::object> tensors;
  pybind11::object lasts = pybind11::none();

  void add(pybind11::handle tensor, const void* data) {
    if (!lasts.is_none() && pybind11::cast<bool>(lasts(reinterpret_cast<uintptr_t>(data)))) return;
    tensors.push_back(pybind11::reinterpret_borrow<pybind11::object>(tensor));
  }
};

inline KeptTensors*& keep_alive() {
  static thread_local KeptTensors* tensors = nullptr;
  return tensors;
}

}  // namespace fastllm

namespace pybind11::detail {

template <>
struct type_caster<fastllm::TensorView> {
  PYBIND11_TYPE_CASTER(fastllm::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    const auto& boundary = fastllm::Boundary::get();
    if (!boundary.is_tensor(source.ptr())) {
      throw type_error(std::string("fastllm: an argument is a ") + Py_TYPE(source.ptr())->tp_name +
                       ", expected a torch.Tensor");
    }
    if (boundary.api != nullptr) {
      fastllm::view_by_exchange_api(source.ptr(), value);
    } else {
      fastllm::view_by_attributes(source.ptr(), value);
    }
    if (value.data == nullptr && value.numel() != 0) {
      fastllm::refuse_storage(source.ptr(), "this one (a meta, fake or functional tensor) has only a shape");
    }
    if (auto* kept = fastllm::keep_alive()) kept->add(source, value.data);
    return true;
  }
};

}  // namespace pybind11::detail
