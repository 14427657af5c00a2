// quant_matmul with float activations, and how every product is cut into blocks. quant_matmul_kernel.cuh draws how data
// travels; here is what a step does with a lane's 16 bytes (8 bits: twice 16).
//
//   dword  nibbles, lowest first: columns 0 4 1 5 2 6 3 7       & 0x000f000f: columns 0 and 2; >> 8: 1 and 3;
//                                                               >> 4: 4 and 6; >> 12: 5 and 7
//   16-bit float 1024 (bf16: 128) has its units in the lowest bit: OR a nibble under the exponent, subtract 1024 + 8,
//   and there is u = q - 8 without a conversion, exact. bytes: the same with 128 (bf16 has 7 bits: see below).
//   w = u * scale + offset. The products of 32 columns are summed from zero as u * x, then
//   acc = fma(sum, scale, acc) in fp32, so that the weight is never rounded; acc = fma(offset, sum of x, acc), the sum
//   of x being one more product, with ones.
//
// Bytes: N K bits / 8 and the scales; 4 bits in groups of 32 with a minimum take 5 bits a weight. Flops: 2 M N K.
// Instructions: a multiprocessor of an H200 issues 4 a cycle, 27 in the time that its share of 4.3 TB/s takes for 128
// bytes, a dword a lane; 34 in groups of 32 with a minimum, whose scales take time too. In PTX a step (4 dwords a lane)
// of 4 bits, bf16, with a minimum, has 44 to unpack, 6 products, 16 fma, 4 for x's order and 11 loads and addresses,
// and a stretch (4 steps) about 110 for copies and scales: 27 a dword, 80 % of what fits. Memory is the limit, with
// little to spare: 70 to 80 % of 4.3 TB/s expected where a multiprocessor has 16 warps for some microseconds (14336 x
// 4096 and up), less below, where the launch is as long as the reading. Without a minimum 24, fp16 2 less. int8 rows,
// bf16: 90 a step of 8 dwords with and 79 without an offset, 17 a dword with a stretch's share: 80 to 85 %.
// 64 tokens: 8 times 4 products a step, 6 with a minimum, at some 6 cycles of a quarter's matrix unit, and 8 times 27
// instructions: above some 24 tokens these are the limit; 14336 x 4096 for 64 tokens takes some 20 us, three times as
// long as its bytes.
#include "quant_matmul.h"
#include "quant_matmul_kernel.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kAndOr = 0xea, kAndXor = 0x6a;  // lop3: (a & b) | c, (a & b) ^ c

template <typename T>
struct Half;
template <>
struct Half<f16> {
  static constexpr unsigned kOnes = 0x3c003c00;
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    ptx::mma_f16(c, a, b0, b1);
  }
  // q - 8 of columns (0 2)(1 3)(4 6)(5 7). 1024 + 16 q is as good as 1024 + q, divided by 16: one shift serves four
  // pairs.
  static __device__ __forceinline__ void unpack_nibbles(unsigned (&u)[4], unsigned q) {
    const unsigned q8 = q >> 8;
    u[0] = ptx::f16x2_sub(ptx::lop3<kAndOr>(q, 0x000f000f, 0x64006400), 0x64086408);
    u[1] = ptx::f16x2_sub(ptx::lop3<kAndOr>(q8, 0x000f000f, 0x64006400), 0x64086408);
    u[2] = ptx::f16x2_fma(ptx::lop3<kAndOr>(q, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);  // / 16 - 72
    u[3] = ptx::f16x2_fma(ptx::lop3<kAndOr>(q8, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);
  }
  // q - 128 of bytes 0 and 2.
  static __device__ __forceinline__ unsigned unpack_bytes(unsigned q) {
    return ptx::f16x2_sub(ptx::lop3<kAndOr>(q, 0x00ff00ff, 0x64006400), 0x64806480);
  }
};
template <>
struct Half<bf16> {
  static constexpr unsigned kOnes = 0x3f803f80;
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    ptx::mma_bf16(c, a, b0, b1);
  }
  static __device__ __forceinline__ void unpack_nibbles(unsigned (&u)[4], unsigned q) {
    const auto pair = [](unsigned nibbles) {
      return ptx::bf16x2_fma(ptx::lop3<kAndOr>(nibbles, 0x000f000f, 0x43004300), kOnes, 0xc308c308);  // - 136
    };
    u[0] = pair(q), u[1] = pair(q >> 8), u[2] = pair(q >> 4), u[3] = pair(q >> 12);
  }
  // Seven bits fit under 128's exponent. The eighth is worth 128: it turns the -256 that is added into -128.
  static __device__ __forceinline__ unsigned unpack_bytes(unsigned q) {
    const unsigned low = ptx::lop3<kAndOr>(q, 0x007f007f, 0x43004300);
    return ptx::bf16x2_fma(low, kOnes, ptx::lop3<kAndXor>(q, 0x00800080, 0xc380c380));
  }
};

template <typename T, int kBits>
struct FloatMath {
  using X = uint4;
  static constexpr int kXBytes = 2;
  static constexpr int kLoads = kBits == 8 ? 2 : 1;  // of 16 bytes a step
  static constexpr int kRegisters = 4;               // of a row's 8 columns
  static constexpr float kUnit = 1.0f;               // what u = 1 is worth
  static constexpr bool kHeldSums = false;           // a step's sums are closed with it
  static __device__ __forceinline__ bool closes(const ProductArgs&, int) { return true; }

  struct Sums {
    float at[2][4];
  };
  static __device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (auto& rows : sums.at)
#pragma unroll
      for (float& sum : rows) sum = 0.0f;
  }

  // u of 4 rows as pairs of columns (0 2)(1 3)(4 6)(5 7).
  static __device__ __forceinline__ void unpack(unsigned (&u)[4][4], const uint4 (&w)[kLoads]) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const unsigned rows[4] = {w[load].x, w[load].y, w[load].z, w[load].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kBits == 4) {
          Half<T>::unpack_nibbles(u[j], rows[j]);
        } else {
          u[j][2 * load] = Half<T>::unpack_bytes(rows[j]);
          u[j][2 * load + 1] = Half<T>::unpack_bytes(rows[j] >> 8);
        }
      }
    }
  }

  // x's columns in the same pairs.
  struct Operand {
    unsigned at[4];
  };
  static __device__ __forceinline__ Operand operand(uint4 x) {
    return {{__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x5410),
             __byte_perm(x.z, x.w, 0x7632)}};
  }

  static __device__ __forceinline__ void multiply(Sums& sums, const unsigned (&u)[4][4], const Operand& b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const unsigned (&upper)[4] = u[2 * tile], (&lower)[4] = u[2 * tile + 1];
        const unsigned w[4] = {upper[2 * half], lower[2 * half], upper[2 * half + 1], lower[2 * half + 1]};
        Half<T>::multiply(sums.at[tile], w, b.at[2 * half], b.at[2 * half + 1]);
      }
    }
  }

  template <bool kOffset>
  static __device__ __forceinline__ void close(float (&acc)[2][4], const Sums& sums, const float (&scale)[4],
                                               const float (&offset)[4], const Operand& b, const ProductArgs&, int,
                                               int64_t) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[tile][e] = fmaf(sums.at[tile][e], scale[2 * tile + e / 2], acc[tile][e]);
    if constexpr (!kOffset) return;
    constexpr unsigned kOnes = Half<T>::kOnes;
    const unsigned ones[4] = {kOnes, kOnes, kOnes, kOnes};
    float of_x[4] = {};  // elements 0 and 1: of this lane's two tokens
#pragma unroll
    for (int half = 0; half < 2; ++half) Half<T>::multiply(of_x, ones, b.at[2 * half], b.at[2 * half + 1]);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[tile][e] = fmaf(offset[2 * tile + e / 2], of_x[e % 2], acc[tile][e]);
  }
};

// ---------------------------------------------------------------- small kernels before and after

struct ArrangeArgs {
  const uint16_t* x;  // (M, K), row starts at x_rows
  Rows x_rows;
  int64_t M, K, stride;
  uint16_t* to;  // (M, stride), columns past K are 0
};

constexpr int kCopyThreads = 256;

// Rows that cannot be read 16 bytes at a time become rows that can.
__global__ void __launch_bounds__(kCopyThreads) arrange_kernel(ArrangeArgs a) {
  const int64_t k = static_cast<int64_t>(blockIdx.y) * kCopyThreads + threadIdx.x, m = blockIdx.x;
  if (k < a.stride) a.to[m * a.stride + k] = k < a.K ? a.x[row_offset(a.x_rows, m) + k] : 0;
}

struct AddSplitsArgs {
  const float* parts;  // (splits, M, N)
  const void* bias;
  void* y;
  DType dtype;
  int64_t size, N;
  int splits;
};

__global__ void __launch_bounds__(kCopyThreads) add_splits_kernel(AddSplitsArgs a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (at >= a.size) return;
  float sum = a.bias ? load_float(a.bias, a.dtype, at % a.N) : 0.0f;
  for (int split = 0; split < a.splits; ++split) sum += a.parts[split * a.size + at];
  store_float(a.y, a.dtype, at, sum);
}

// ---------------------------------------------------------------- what is launched

struct Plan {
  Cut cut;
  bool arrange, quantize;     // x is copied first, or rounded to integers
  int x_group, num_x_groups;  // int8 activations
  int64_t x_columns;          // a row's, of what the product reads
  int64_t x_floats, group_floats, part_floats;
};

// Whether the product can read floats where they are: rows at one stride, in 16 bytes.
bool is_readable(const QuantMatmulArgs& a) {
  return a.x_rows.ndim <= 1 && a.K % 8 == 0 && is_aligned(a.x, 16) && rows_are_aligned(a.x_rows, 8);
}

Cut cut_of(const QuantMatmulArgs& a, int multiprocessors) {
  const int64_t units = (a.K + kUnitSteps * kStepColumns - 1) / (kUnitSteps * kStepColumns);
  Cut cut{1, 0, 1};
  while (cut.tiles < kMostTiles && cut.tiles * kTokens < a.M) cut.tiles *= 2;
  const int team_warps = cut.tiles == 1 ? 1 : 4;
  const int64_t blocks = ceil_div(a.N, kStripRows * team_warps), most = kMostWarps / team_warps;
  const int64_t teams = units < most ? units : most;
  cut.warps = static_cast<int>(teams) * team_warps;
  // A split is worth its partial sums where multiprocessors would have nothing to do and two units are left for a team.
  while (blocks * cut.splits * 2 <= multiprocessors && units >= cut.splits * 2 * teams * 2) cut.splits *= 2;
  return cut;
}

Plan plan_of(const QuantMatmulArgs& a, int device) {
  Plan plan{};
  plan.cut = cut_of(a, gpu(device).multiprocessors);
  plan.x_columns = a.K;
  if (a.int8_activations) {
    plan.x_group = a.group_size == 32 || a.group_size == 64 ? a.group_size : 128;
    plan.num_x_groups = ceil_div(a.K, plan.x_group);
    plan.quantize = a.x_groups == nullptr;
    if (plan.quantize) {
      plan.x_columns = static_cast<int64_t>(plan.num_x_groups) * plan.x_group;
      plan.x_floats = a.M * plan.x_columns / 4;  // whole pieces of 16 bytes, which copies and the groups behind need
      plan.group_floats = a.M * plan.num_x_groups * 2;
    }
  } else if (!is_readable(a)) {
    plan.arrange = true;
    plan.x_columns = (a.K + 7) / 8 * 8;
    plan.x_floats = a.M * plan.x_columns / 2;
  }
  if (plan.cut.splits > 1) plan.part_floats = plan.cut.splits * a.M * a.N;
  return plan;
}

int log2_of(int x) {
  int log = 0;
  while (1 << log < x) ++log;
  return log;
}

}  // namespace

int64_t quant_matmul_workspace(const QuantMatmulArgs& a, int device) {
  if (a.M == 0) return 0;
  const Plan plan = plan_of(a, device);
  return plan.x_floats + plan.group_floats + plan.part_floats;
}

void quant_matmul(const QuantMatmulArgs& a, Place place) {
  if (a.M == 0) return;
  const Plan plan = plan_of(a, place.device);
  float* made_groups = a.workspace + plan.x_floats;
  float* parts = made_groups + plan.group_floats;
  const bool split = plan.cut.splits > 1;

  ProductArgs p{};
  p.x = a.x;
  p.x_stride = a.x_rows.ndim == 0 ? 0 : a.x_rows.strides[0];
  if (plan.arrange) {
    auto* to = reinterpret_cast<uint16_t*>(a.workspace);
    const Shape shape{dim3(static_cast<unsigned>(a.M), ceil_div(plan.x_columns, kCopyThreads)), kCopyThreads};
    launch("quant_matmul, rows of x", arrange_kernel, shape,
           ArrangeArgs{static_cast<const uint16_t*>(a.x), a.x_rows, a.M, a.K, plan.x_columns, to}, place);
  }
  if (plan.quantize) {
    auto* q = reinterpret_cast<int8_t*>(a.workspace);
    quantize_activations({a.x, a.dtype, a.x_rows, a.M, a.K, plan.x_group, plan.num_x_groups, q, made_groups}, place);
  }
  if (plan.arrange || plan.quantize) {
    p.x = a.workspace;
    p.x_stride = plan.x_columns;
  }
  p.x_groups = plan.quantize ? made_groups : a.x_groups;
  p.data = a.data;
  p.scale = static_cast<const uint8_t*>(a.scale);
  p.minimum = static_cast<const uint8_t*>(a.minimum);
  p.bias = split ? nullptr : a.bias;
  p.out = split ? parts : a.y;
  p.scale_dtype = a.scale_dtype;
  p.out_dtype = split ? DType::f32 : a.dtype;
  p.M = a.M;
  p.N = a.N;
  p.K = static_cast<int>(plan.x_columns);
  p.lines = static_cast<int>(a.lines);
  p.groups = static_cast<int>(a.groups);
  p.steps = ceil_div(a.K, kStepColumns);
  p.group_shift = a.groups == 1 ? 31 : log2_of(a.group_size / kStepColumns);
  p.x_group_shift = a.int8_activations ? log2_of(plan.x_group / kStepColumns) : 0;
  p.num_x_groups = plan.num_x_groups;
  const int center = 1 << (a.bits - 1);
  p.center_minus_zero = static_cast<float>(center - a.zero);
  p.has_offset = a.minimum != nullptr || center != a.zero;

  if (a.int8_activations) {
    launch_int8_product(p, a.bits, plan.cut, place);
  } else if (a.dtype == DType::bf16) {
    (a.bits == 4 ? launch_product<FloatMath<bf16, 4>> : launch_product<FloatMath<bf16, 8>>)(p, plan.cut, place);
  } else {
    (a.bits == 4 ? launch_product<FloatMath<f16, 4>> : launch_product<FloatMath<f16, 8>>)(p, plan.cut, place);
  }
  if (split) {
    const int64_t size = a.M * a.N;
    launch("quant_matmul, sum of splits", add_splits_kernel, Shape{dim3(ceil_div(size, kCopyThreads)), kCopyThreads},
           AddSplitsArgs{parts, a.bias, a.y, a.dtype, size, a.N, plan.cut.splits}, place);
  }
}

}  // namespace fastllm::cuda
