"""The faults that mutate.py plants in what an edit adds: key bias, rule rest, shared lists, slots of each sequence."""

from __future__ import annotations

from fault import Fault

EDIT: list[Fault] = [
    Fault(
        "the bias of the first head for all",
        "kernels/bias.h",
        "p.problem.edit.key_bias + batch * strides[0] + head * strides[1]",
        "p.problem.edit.key_bias + batch * strides[0]",
    ),
    Fault(
        "a bias by position, not by slot",
        "kernels/bias.h",
        "head * strides[1] + p.problem.visibility.key_offset * strides[2];",
        "head * strides[1];",
    ),
    Fault(
        "a tile counts as ordinary, whatever its bias holds",
        "kernels/bias.h",
        "plain = plain && fabsf(bias[key]) <= kFarBias;",
        "plain = plain && bias != nullptr;",
    ),
    Fault(
        "a tile is ordinary by the bias of one head of several",
        "kernels/bias.h",
        "edit.bias_strides[1] == 0 ? 1 : p.group < 16 ? p.group : 16;",
        "1;",
    ),
    Fault(
        "the bias holds for all rows",
        "kernels/bias.h",
        "limit = !holds || held < 0 ? 0",
        "limit = held < 0 ? 0",
    ),
    Fault(
        "the first query itself has no bias",
        "kernels/bias.h",
        "query_slot(p.problem.visibility, batch, place.query) >= edit.first_query[batch];",
        "query_slot(p.problem.visibility, batch, place.query) > edit.first_query[batch];",
    ),
    Fault(
        "a key that a bias removes is seen",
        "kernels/rows.h",
        "uint32_t hidden = removed;",
        "uint32_t hidden = 0 * removed;",
    ),
    Fault(
        "a removed key counts as seen in received attention",
        "kernels/received.h",
        "rows.valid[i] && !((removed >> (4 * n + e)) & 1u) &&",
        "rows.valid[i] && removed == removed &&",
    ),
    Fault(
        "own keys by the slot of the whole batch",
        "kernels/rows.h",
        "const int64_t position = query_slot(visibility, batch, query) - visibility.key_offset;",
        "const int64_t position = visibility.query_offset + query + 0 * batch - visibility.key_offset;",
    ),
    Fault(
        "the first head's list for all heads where one serves all queries",
        "kernels/sequences.h",
        "batch, place.head, place.query);",
        "batch, p.problem.edit.shared_rows ? 0 : place.head, place.query);",
    ),
    Fault(
        "outliers are not taken out of the others' softmax",
        "kernels/attention.h",
        "          s[n][2 * i + e] = minus_infinity();\n        }\n      kept.set_chosen",
        "        }\n      kept.set_chosen",
    ),
    Fault(
        "the outliers' sum without its reference",
        "kernels/attention.h",
        "float sum = kept.chosen_sum(i) * fast_exp2(kept.chosen_max(i) - from);",
        "float sum = kept.chosen_sum(i);",
    ),
    Fault(
        "no barrier before the next tile of outliers",
        "kernels/attention.h",
        "        accumulate(s, unchanged, true);\n      }\n      block_sync();",
        "        accumulate(s, unchanged, true);\n      }",
    ),
    Fault(
        "scores set aside are forgotten where outliers are to be found",
        "kernels/attention.h",
        "    if (certainly) marks.mark(tile);\n",
        "",
    ),
    Fault(
        "the others share what the outliers gain",
        "kernels/rest.h",
        "rest / sum - gain * mass,",
        "rest / sum + gain * mass,",
    ),
    Fault(
        "a row of outliers alone loses its gain's share",
        "kernels/rest.h",
        "return {sum == 0.0f ? 0.0f : 1.0f, 0.0f, max, sum};",
        "return {sum == 0.0f ? 0.0f : 1.0f + gain, 0.0f, max, sum};",
    ),
    Fault(
        "split outliers are merged relative to the others' reference",
        "kernels/merge.h",
        "    chosen_max = chosen.keys_max;",
        "    chosen_max = merged.keys_max;",
    ),
    Fault(
        "backward: no bias in the weights",
        "kernels/gradient.h",
        "            from = fmaf(bias, kLog2E, from);\n",
        "",
        "gradient_float32.cu",
    ),
    Fault(
        "backward: rows before the first query add to the bias",
        "kernels/gradient.h",
        "if (visible && key < bias_row.limit) sums_of_row[i] +=",
        "if (visible) sums_of_row[i] +=",
        "gradient_float32.cu",
    ),
    Fault(
        "backward: a bias gets the gradient of the capped score",
        "kernels/gradient.h",
        "sums_of_row[i] += weight * of_score;",
        "sums_of_row[i] += weight * of_score * (capped ? 1.0f - score * score : 1.0f);",
        "gradient_float32.cu",
    ),
    Fault(
        "backward: the rows of the first head for every bias",
        "kernels/gradient.h",
        "(kOneHead ? row * p.group + in_group : row);",
        "(kOneHead ? row * p.group : row);",
        "gradient_float32.cu",
    ),
    Fault(
        "backward: a bias for all sequences gets the first one's",
        "kernels/gradient_sums.h",
        "b < (batches == 1 ? shape.batch : batch + 1)",
        "b < batch + 1",
        "gradient_sums.cu",
    ),
    Fault(
        "backward: a removed key counts in the mean of received attention",
        "kernels/gradient_sums.h",
        "const int64_t last = end < limit ? end : limit;",
        "const int64_t last = limit < 0 ? limit : end;",
        "gradient_sums.cu",
    ),
    Fault(
        "backward: a sink is none of the others",
        "kernels/gradient_marks.h",
        "  if (sinks != nullptr) others +=",
        "  if (sinks == nullptr && others < 0.0f) others +=",
        "gradient_float32.cu",
    ),
    Fault(
        "backward: delta of the others for outliers",
        "kernels/gradient.h",
        "(marked ? row.outlier_delta : row.delta)",
        "row.delta",
        "gradient_float32.cu",
    ),
    Fault(
        "backward: the others keep their weights",
        "kernels/gradient.h",
        "if (!marked) boost = row.of_others;",
        "if (!marked) boost = 1.0f;",
        "gradient_float32.cu",
    ),
]
