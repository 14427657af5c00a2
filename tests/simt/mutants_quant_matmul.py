"""Wrong variants of quant_matmul's CUDA kernels: see mutants.py."""

KERNEL, FLOAT, INT8 = "quant_matmul_kernel.cuh", "quant_matmul.cu", "quant_matmul_int8.cu"

MUTANTS = [
    (KERNEL, "a team does not meet before it reads", "ptx::barrier(1 + team, F::kTeamThreads);", ";", "quant_matmul and 40x50x544"),
    (KERNEL, "a stage is read before it has come", "wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>", "quant_matmul and 2x80x4224"),
    (KERNEL, "the stage that is read is filled", "fetch(slot == 0 ? kStages - 1 : slot - 1,", "fetch(slot,", "quant_matmul and 2x80x4224"),
    (KERNEL, "widened scales are read before they are there", "    }\n    __syncwarp();\n  };", "    }\n  };", "quant_matmul and 4x50x1536"),
    (KERNEL, "scales of the next step's group", "const int group = step >> a.group_shift;", "const int group = (step + 1) >> a.group_shift;", "quant_matmul and 31x40x576"),
    (KERNEL, "no minimum", "if (a.minimum) load_scales(offset,", "if (false) load_scales(offset,", "quant_matmul and minimum 31x40x576"),
    (KERNEL, "two tokens change places", "token = t * kTokens + 2 * i + c,", "token = t * kTokens + 2 * i + (c ^ 1),", "quant_matmul and 7x33x64"),
    (FLOAT, "zero is not subtracted", "static_cast<float>(center - a.zero)", "static_cast<float>(center)", "quant_matmul and both 3x17x96"),
    (FLOAT, "the last split is left out", "split < a.splits;", "split < a.splits - 1;", "quant_matmul and 3x20x4224"),
    (FLOAT, "a bias for each split and one more", "p.bias = split ? nullptr : a.bias;", "p.bias = a.bias;", "quant_matmul and 3x20x4224"),
    (FLOAT, "nibbles 1 and 2 change places", "u[1] = pair(q >> 8), u[2] = pair(q >> 4)", "u[1] = pair(q >> 4), u[2] = pair(q >> 8)", "quant_matmul and 7x33x64 float and bfloat16"),
    (FLOAT, "a byte's highest bit is lost", "ptx::lop3<kAndXor>(q, 0x00800080, 0xc380c380)", "0xc380c380", "quant_matmul and 1x65x576 float and bfloat16"),
    (INT8, "a group of x ends one step late", "((step + 1) &", "(step &", "quant_matmul and 2x50x640 int8"),
    (INT8, "a lane's second token takes the first's scale", "token + c < a.M ? token + c", "token + c < a.M ? token", "quant_matmul_int8 and 31x40x576"),
    (INT8, "the sum of integers is not scaled", "x_sum[c] = x_scale[c] * x.y;", "x_sum[c] = x.y;", "quant_matmul_int8 and 3x17x96"),
    (INT8, "a group past K is the first again", "is_there ? x.x : 0.0f", "x.x", "quant_matmul_int8 and 3x20x64"),
    (FLOAT, "given integers lie row behind row", "a.x_rows.ndim == 0 ? 0 : a.x_rows.strides[0]", "a.x_groups ? a.K : a.x_rows.strides[0]", "quant_matmul_int8 and strided"),
    ("int8_groups.cuh", "x is cut off, not rounded", "__fmul_rn(x, inverse) + 12582912.0f", "truncf(__fmul_rn(x, inverse)) + 12582912.0f", "quant_matmul and 4x50x1536 int8"),
]  # fmt: skip
