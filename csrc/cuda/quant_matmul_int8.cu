// quant_matmul with int8 activations: x is rounded to integers for each token and group of columns, products of signed
// bytes are summed exactly in int32 over a group, groups in fp32.
//
//   u = q - center, an int8; offset = minimum + (center - zero) * scale, so w = u * scale + offset
//   y += sum(u xq) * (scale * sx) + offset * (sx * sum(xq))       sx, sum(xq) of x's group: int8_groups.cuh
//
//   a matrix instruction's 32 columns are the 8 of each lane: registers hold columns 0-3 and 4-7, of x too, in order.
//   8 bits: two dwords, the sign bit flipped. 4 bits: nibbles of one dword in the upper halves of bytes, 16 u; the
//   scale is divided by 16, which is exact.
//
// Bytes: the weight's, as with float activations; x is small. Instructions a step of 4 bits (4 dwords a lane), of which
// 34 a dword fit: 12 to unpack, 2 products, and where a group of x ends 8 subtractions, 8 scales and 16 fma: 75 in
// groups of 32 and some 40 in groups of 128, 18 to 26 a dword with the copies' share. Memory is the limit: 80 % of 4.3
// TB/s expected on large weights, and with more tokens than float activations before the arithmetic shows.
//
// Quantising x is a launch of its own, some 2 us, which a small product does not hide, and in bf16 moves 3 K bytes a
// token and the groups'. Where the op before has written integers (rms_norm_int8, gated_activation_int8) it is not
// there: they are read where they lie, and nothing but splits of K needs a workspace.
#include "int8_groups.cuh"
#include "quant_matmul_kernel.cuh"

namespace fastllm::cuda {
namespace {

template <int kBits>
struct Int8Math {
  using X = uint2;
  static constexpr int kXBytes = 1;
  static constexpr int kLoads = kBits == 8 ? 2 : 1;
  static constexpr int kRegisters = 2;
  static constexpr float kUnit = kBits == 4 ? 1.0f / 16 : 1.0f;
  static constexpr bool kHeldSums = true;  // until the group of x ends
  static __device__ __forceinline__ bool closes(const ProductArgs& a, int step) {
    return ((step + 1) & ((1 << a.x_group_shift) - 1)) == 0;
  }

  // Sums start at the bits of 1.5 * 2^23, whose units are the lowest bit: read as a float, less 1.5 * 2^23, they are
  // the sum, exact below 2^22. 128 columns of 128 * 127 are below 2^21.
  static constexpr int kBits0 = 0x4b400000;
  static constexpr float kFloat0 = 12582912.0f;
  struct Sums {
    int at[2][4];
  };
  static __device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (auto& rows : sums.at)
#pragma unroll
      for (int& sum : rows) sum = kBits0;
  }

  static __device__ __forceinline__ void unpack(unsigned (&u)[4][2], const uint4 (&w)[kLoads]) {
    constexpr int kAndXor = 0x6a;  // (a & b) ^ c
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const unsigned rows[4] = {w[load].x, w[load].y, w[load].z, w[load].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kBits == 4) {
          u[j][0] = ptx::lop3<kAndXor>(rows[j] << 4, 0xf0f0f0f0, 0x80808080);
          u[j][1] = ptx::lop3<kAndXor>(rows[j], 0xf0f0f0f0, 0x80808080);
        } else {
          u[j][load] = rows[j] ^ 0x80808080;
        }
      }
    }
  }

  static __device__ __forceinline__ uint2 operand(uint2 x) { return x; }

  static __device__ __forceinline__ void multiply(Sums& sums, const unsigned (&u)[4][2], uint2 b) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const unsigned (&upper)[2] = u[2 * tile], (&lower)[2] = u[2 * tile + 1];
      const unsigned w[4] = {upper[0], lower[0], upper[1], lower[1]};
      ptx::mma_s8(sums.at[tile], w, b.x, b.y);
    }
  }

  // token: the first of this lane's two.
  template <bool kOffset>
  static __device__ __forceinline__ void close(float (&acc)[2][4], const Sums& sums, const float (&scale)[4],
                                               const float (&offset)[4], uint2, const ProductArgs& a, int step,
                                               int64_t token) {
    // Tokens past M take the last one's, for nobody. A group past K has none: 0 here, as its integers are.
    const int group = step >> a.x_group_shift;
    const bool is_there = group < a.num_x_groups;
    float x_scale[2], x_sum[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t m = token + c < a.M ? token + c : a.M - 1;
      const float2 x = reinterpret_cast<const float2*>(a.x_groups)[m * a.num_x_groups + (is_there ? group : 0)];
      x_scale[c] = is_there ? x.x : 0.0f;
      x_sum[c] = x_scale[c] * x.y;
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = __int_as_float(sums.at[tile][e]) - kFloat0;
        acc[tile][e] = fmaf(sum, scale[2 * tile + e / 2] * x_scale[e % 2], acc[tile][e]);
        if constexpr (kOffset) acc[tile][e] = fmaf(offset[2 * tile + e / 2], x_sum[e % 2], acc[tile][e]);
      }
    }
  }
};

// ---------------------------------------------------------------- activations to integers

constexpr int kQuantizeWarps = 4;

// A warp: one group of one token.
template <typename T>
__global__ void __launch_bounds__(32 * kQuantizeWarps) quantize_kernel(QuantizeArgs a) {
  constexpr int kMost = 4;  // elements a lane
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kQuantizeWarps + threadIdx.x / 32, group = blockIdx.y;
  if (token >= a.M) return;
  const T* x = static_cast<const T*>(a.x) + row_offset(a.x_rows, token);
  float values[kMost];
  float largest = 0.0f;
#pragma unroll
  for (int e = 0; e < kMost; ++e) {
    const int64_t within = e * 32 + lane, k = group * a.group + within;
    values[e] = within < a.group && k < a.K ? widen(x[k]) : 0.0f;
    largest = Largest()(largest, fabsf(values[e]));
  }
  const Int8Scale scale = int8_scale(reduce_lanes<32>(largest, Largest()));
  int sum = 0;
  int8_t* q = a.q + (token * a.num_groups + group) * a.group;
#pragma unroll
  for (int e = 0; e < kMost; ++e) {
    const auto rounded = static_cast<int8_t>(scale.inverse != 0.0f ? int8_bits(values[e], scale.inverse) : 0);
    sum += rounded;
    if (e * 32 + lane < a.group) q[e * 32 + lane] = rounded;
  }
  sum = reduce_lanes<32>(sum, Sum());
  if (lane == 0)
    reinterpret_cast<float2*>(a.x_groups)[token * a.num_groups + group] = {scale.step, static_cast<float>(sum)};
}

}  // namespace

void launch_int8_product(const ProductArgs& a, int bits, const Cut& cut, Place place) {
  (bits == 4 ? launch_product<Int8Math<4>> : launch_product<Int8Math<8>>)(a, cut, place);
}

void quantize_activations(const QuantizeArgs& a, Place place) {
  const Shape shape{dim3(ceil_div(a.M, kQuantizeWarps), static_cast<unsigned>(a.num_groups)), 32 * kQuantizeWarps};
  const auto body = [&](auto t) { launch("quant_matmul, x in int8", quantize_kernel<decltype(t)>, shape, a, place); };
  FASTLLM_FOR_FLOAT(a.dtype, body)
}

}  // namespace fastllm::cuda
