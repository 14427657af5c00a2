"""Wrong variants of attention's kernels, as mutants.py has them: (file, what, line, what stands there instead, pytest's -k)."""

MUTANTS = [
    ("attention_prefill.cu", "no barrier before a tile is read", "__syncthreads();  // this half is there", "// this half is there", "attention and 150"),
    ("attention_prefill.cu", "a tile is read before it has arrived", "ptx::wait_for_copies<kSlots - 2>();", "ptx::wait_for_copies<kSlots - 1>();", "attention and 150"),
    ("attention_prefill.cu", "sinks are left out", "a.sinks == nullptr ?", "true ?", "attention and sinks"),
    ("attention_prefill.cu", "queries are of the next head", "h * a.q_strides.head;", "(h ^ 1) * a.q_strides.head;", "attention and gpt-oss"),
    ("attention_decode.cu", "a stage is read before it has arrived", "ptx::wait_for_copies<kStages - 2>();", "ptx::wait_for_copies<kStages - 1>();", "attention and decode"),
    ("attention_decode.cu", "chunks are written in order", "16 * swizzled<kChunks>(row, chunk), from", "16 * (row * kChunks + chunk), from", "attention and decode"),
    ("attention_decode.cu", "k's scale is the next token's", "*= sScales[8 * j + e % 2];", "*= sScales[8 * j + e % 2 + 1];", "attention and int8"),
    ("attention_decode.cu", "v's scale is k's", "sScales[kN + 8 * j + e % 2]", "sScales[8 * j + e % 2]", "attention and int8"),
    ("attention_decode.cu", "sinks are left out", "a.sinks == nullptr ?", "true ?", "attention and pages and sinks"),
    ("attention_decode.cu", "splits are added up before their weights are there", "    const float weight = ptx::exp2(softmax.x - shift);", "    const float weight = 1.0f;", "attention and decode"),
    ("attention_tile.cuh", "a query sees the next key", "min(range.end, high + 1)", "min(range.end, high + 2)", "attention and 150"),
    ("attention_tile.cuh", "the window is one too wide", "low - a.window + 1", "low - a.window", "attention and window"),
    ("attention_tile.cuh", "the table is not looked at", "static_cast<int>(load_index(a.block_table, a.table_dtype, at))", "static_cast<int>(page + 0 * at)", "attention and pages"),
    ("attention_tile.cuh", "the second pair of int8 is the first", "odd = pair(bytes >> 8);", "odd = even;", "attention and int8"),
    ("attention_tile.cuh", "sums are not made relative to a new largest score", "rO[m][j][e] *= correction[m][e / 2];", ";", "attention and 150"),
    ("attention_tile.cuh", "lengths are left out", "length > a.S ? a.S : length", "a.S", "attention and kv_lens"),
]  # fmt: skip
