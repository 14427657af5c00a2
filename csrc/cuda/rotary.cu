// Rotary position embedding of q and k, and the write of k and v into the KV cache, in one launch.
//
//   row of a head   |a a a a a a a a|a a ...|b b b b b b b b|b b ...|rest ...|      R = lanes turned, a at i, b at i +
//   R / 2
//                    lane 0 of the    1       0               1       0 ...         16 bytes each: a pair of vectors a
//                    lane, row's kLanes                                                   so that one thread has both
//                    of a pair
//   block           128 threads: 128 / kLanes heads (of q, then k, then v) of one token
//
// Bytes: 2 (H + 2 Hk) D elements a token and one row of cos and of sin, which the token's heads share in the first
// cache; 6 flops for 4 bytes in bf16: copying is the limit from some 500 tokens on. A decode step's few tokens are one
// wave of blocks: its time is the launch and two dependent loads (position, then angles), about 3 us.
#include "int8_groups.cuh"
#include "rotary.h"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 128;

// Angles at `from`, of fp32 or of T.
template <typename T, int kVec>
__device__ __forceinline__ Floats<kVec> load_angles(const void* table, int64_t from, bool is_wide) {
  if (!is_wide) return widened(load_pack<T, kVec>(static_cast<const T*>(table) + from));
  constexpr int kPiece = kVec < 4 ? kVec : 4;
  Floats<kVec> y;
#pragma unroll
  for (int i = 0; i < kVec; i += kPiece) {
    const auto piece = load_pack<float, kPiece>(static_cast<const float*>(table) + from + i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) y.at[i + j] = piece.at[j];
  }
  return y;
}

template <typename To, int kVec>
__device__ __forceinline__ void store_as(void* out, int64_t at, const Floats<kVec>& y) {
  constexpr int kPiece = kVec * sizeof(To) > 16 ? 16 / static_cast<int>(sizeof(To)) : kVec;
#pragma unroll
  for (int i = 0; i < kVec; i += kPiece) {
    Floats<kPiece> piece;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) piece.at[j] = y.at[i + j];
    store_pack<To, kPiece>(static_cast<To*>(out) + at + i, narrowed<To>(piece));
  }
}

template <int kVec>
__device__ __forceinline__ void store(void* out, DType dtype, int64_t at, const Floats<kVec>& y) {
  if (dtype == DType::f32) {
    store_as<float>(out, at, y);
  } else if (dtype == DType::bf16) {
    store_as<bf16>(out, at, y);
  } else {
    store_as<f16>(out, at, y);
  }
}

template <int kVec>
__device__ __forceinline__ void store_int8(void* out, int64_t at, const Floats<kVec>& y, float inverse) {
  Pack<int8_t, kVec> q;
#pragma unroll
  for (int i = 0; i < kVec; ++i) q.at[i] = static_cast<int8_t>(inverse != 0.0f ? int8_bits(y.at[i], inverse) : 0);
  store_pack<int8_t, kVec>(static_cast<int8_t*>(out) + at, q);
}

// kVec: elements of one access. kLanes: of one row. kSteps: pairs of vectors that a lane turns.
template <typename T, int kVec, int kLanes, int kSteps>
__global__ void __launch_bounds__(kThreads) rotary_kernel(RotaryArgs a) {
  const int64_t b = blockIdx.x / a.T, t = blockIdx.x % a.T;
  const int lane = threadIdx.x % kLanes;
  int head = blockIdx.y * (kThreads / kLanes) + threadIdx.x / kLanes;
  int which = 0;
  while (which < a.num_tensors && head >= a.tensors[which].heads) head -= a.tensors[which++].heads;
  const bool is_there = which < a.num_tensors;  // no early return: rows of a warp reduce together
  const RotaryTensor& x = a.tensors[is_there ? which : 0];
  if (!is_there) head = 0;

  const int64_t position = a.positions ? a.positions[b * a.positions_strides[0] + t * a.positions_strides[1]] : t;
  const bool is_known = position >= 0 && position < a.table_rows;
  int64_t slot = x.slotted ? a.slots[b * a.slots_strides[0] + t * a.slots_strides[1]] : t;
  bool writes = is_there && (!x.slotted || (slot >= 0 && slot < a.cache_rows));
  int64_t piece = b;  // the sequence's, or the page
  if (x.slotted && writes && a.block_table != nullptr) {
    const int64_t at = b * a.block_table_strides[0] + slot / a.page * a.block_table_strides[1];
    piece = a.block_table_dtype == DType::i64 ? static_cast<const int64_t*>(a.block_table)[at]
                                              : static_cast<const int32_t*>(a.block_table)[at];
    slot %= a.page;
    writes = piece >= 0 && piece < a.num_pages;
  }
  const T* in = static_cast<const T*>(x.in) + b * x.in_strides[0] + head * x.in_strides[1] + t * x.in_strides[2];
  const int64_t out = piece * x.out_strides[0] + head * x.out_strides[1] + slot * x.out_strides[2];
  const int64_t cos_row = b * a.cos_strides[0] + position * a.cos_strides[1];
  const int64_t sin_row = b * a.sin_strides[0] + position * a.sin_strides[1];
  const bool is_wide = a.table_dtype == DType::f32;

  // ---- the pairs: (a, b) -> (a cos - b sin, b cos + a sin), each lane of a head with its own angle
  const int turned = x.rotated ? a.R : 0;
  const int units = turned / 2 / kVec;
  Floats<kVec> first[kSteps], second[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int unit = step * kLanes + lane;
    if (unit >= units) continue;
    const int at = a.interleaved ? 2 * unit * kVec : unit * kVec;
    const int beside = a.interleaved ? at + kVec : at + turned / 2;
    first[step] = widened(load_pack<T, kVec>(in + at));
    second[step] = widened(load_pack<T, kVec>(in + beside));
    Floats<kVec> cos_first, cos_second, sin_first, sin_second;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      cos_first.at[i] = cos_second.at[i] = sin_first.at[i] = sin_second.at[i] = __int_as_float(0x7fffffff);
    }
    if (is_known) {
      cos_first = load_angles<T, kVec>(a.cos, cos_row + at, is_wide);
      cos_second = load_angles<T, kVec>(a.cos, cos_row + beside, is_wide);
      sin_first = load_angles<T, kVec>(a.sin, sin_row + at, is_wide);
      sin_second = load_angles<T, kVec>(a.sin, sin_row + beside, is_wide);
    }
    const auto turn = [](float& left, float& right, float cos_left, float cos_right, float sin_left, float sin_right) {
      const float before = left;
      left = left * cos_left - right * sin_left;
      right = right * cos_right + before * sin_right;
    };
    if (a.interleaved && kVec > 1) {  // both of a pair lie in one vector
#pragma unroll
      for (int i = 0; i + 1 < kVec; i += 2) {
        turn(first[step].at[i], first[step].at[i + 1], cos_first.at[i], cos_first.at[i + 1], sin_first.at[i],
             sin_first.at[i + 1]);
        turn(second[step].at[i], second[step].at[i + 1], cos_second.at[i], cos_second.at[i + 1], sin_second.at[i],
             sin_second.at[i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        turn(first[step].at[i], second[step].at[i], cos_first.at[i], cos_second.at[i], sin_first.at[i],
             sin_second.at[i]);
      }
    }
  }

  // ---- lanes that are not turned: bit for bit where the dtypes agree
  const int rest = (a.D - turned) / kVec;
  Pack<T, kVec> copied[2 * kSteps];
#pragma unroll
  for (int step = 0; step < 2 * kSteps; ++step) {
    const int vector = step * kLanes + lane;
    if (vector < rest) copied[step] = load_pack<T, kVec>(in + turned + vector * kVec);
  }

  // ---- an int8 row has one step for all its lanes
  float inverse = 0.0f;
  if (a.tensors[a.num_tensors - 1].scale != nullptr) {  // uniform: all lanes come to the shuffles
    float largest = 0.0f;
    const auto look = [&](const Floats<kVec>& y) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) largest = Largest()(largest, fabsf(y.at[i]));
    };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * kLanes + lane < units) look(first[step]), look(second[step]);
    }
#pragma unroll
    for (int step = 0; step < 2 * kSteps; ++step) {
      if (step * kLanes + lane < rest) look(widened(copied[step]));
    }
    largest = reduce_lanes<kLanes>(largest, Largest());
    const Int8Scale scale = int8_scale(largest);
    inverse = scale.inverse;
    if (writes && x.scale != nullptr && lane == 0)
      x.scale[piece * x.scale_strides[0] + head * x.scale_strides[1] + slot * x.scale_strides[2]] = scale.step;
  }
  if (!writes) return;

  const auto store_lanes = [&](int at, const Floats<kVec>& y) {
    if (x.out_dtype == DType::i8) {
      store_int8<kVec>(x.out, out + at, y, inverse);
    } else {
      store<kVec>(x.out, x.out_dtype, out + at, y);
    }
  };
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int unit = step * kLanes + lane;
    if (unit >= units) continue;
    const int at = a.interleaved ? 2 * unit * kVec : unit * kVec;
    store_lanes(at, first[step]);
    store_lanes(a.interleaved ? at + kVec : at + turned / 2, second[step]);
  }
#pragma unroll
  for (int step = 0; step < 2 * kSteps; ++step) {
    const int vector = step * kLanes + lane;
    if (vector >= rest) continue;
    if (x.out_dtype == a.dtype) {
      store_pack<T, kVec>(static_cast<T*>(x.out) + out + turned + vector * kVec, copied[step]);
    } else {
      store_lanes(turned + vector * kVec, widened(copied[step]));
    }
  }
}

template <typename T, int kVec, int kLanes, int kSteps>
void launch_as(const RotaryArgs& a, Place place) {
  int heads = 0;
  for (int i = 0; i < a.num_tensors; ++i) heads += a.tensors[i].heads;
  const Shape shape{dim3(static_cast<unsigned>(a.B * a.T), ceil_div(heads, kThreads / kLanes)), kThreads};
  if (heads > 0) launch("rotary", rotary_kernel<T, kVec, kLanes, kSteps>, shape, a, place);
}

int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }

bool is_in_vectors(const void* address, const int64_t* strides, int num_strides, int elements, DType dtype) {
  const int bytes = elements * bytes_of(dtype);
  bool is = is_aligned(address, bytes > 16 ? 16 : bytes);
  for (int i = 0; i < num_strides; ++i) is = is && strides[i] % elements == 0;
  return is;
}

template <typename T>
bool in_vectors(const RotaryArgs& a) {
  constexpr int kVec = kPerVector<T>;
  bool is = a.R / 2 % kVec == 0 && a.D % kVec == 0 && a.D <= 2 * kVec * 16;
  is = is && is_in_vectors(a.cos, a.cos_strides, 2, kVec, a.table_dtype);
  is = is && is_in_vectors(a.sin, a.sin_strides, 2, kVec, a.table_dtype);
  for (int i = 0; i < a.num_tensors; ++i) {
    const RotaryTensor& x = a.tensors[i];
    is = is && is_in_vectors(x.in, x.in_strides, 3, kVec, a.dtype) &&
         is_in_vectors(x.out, x.out_strides, 3, kVec, x.out_dtype);
  }
  return is;
}

}  // namespace

void rotary(const RotaryArgs& a, Place place) {
  if (a.B * a.T == 0 || a.D == 0) return;
  const auto body = [&](auto t) {
    using T = decltype(t);
    constexpr int kVec = kPerVector<T>;
    if (!in_vectors<T>(a)) {
      launch_as<T, 1, 32, kMaxRotaryD / 64>(a, place);
    } else if (a.D <= 2 * kVec * 4) {
      launch_as<T, kVec, 4, 1>(a, place);
    } else if (a.D <= 2 * kVec * 8) {
      launch_as<T, kVec, 8, 1>(a, place);
    } else {
      launch_as<T, kVec, 16, 1>(a, place);
    }
  };
  FASTLLM_FOR_FLOAT(a.dtype, body)
}

}  // namespace fastllm::cuda
