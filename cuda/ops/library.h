// Attention on the device: the dense part by PyTorch's own kernels where they take the case, all of it by ours
// elsewhere.
#pragma once

#include "device.h"

namespace attnrb::ops {

// Runs a problem of at least one query and one key, all but its output filled in, and returns that.
//
// PyTorch chooses as scaled_dot_product_attention does: its flash, cuDNN or memory-efficient kernel. They are asked for
// prefill in 16 bits where queries see all keys, or all up to their own; decoding, which a kernel of ours does in one
// pass, and whatever else a problem may ask for is ours, and so is everything where the user has turned theirs off
// (torch.backends.cuda.enable_flash_sdp and others).
Tensor attend_on_device(AttentionProblem& problem, const Tensor& query, const Tensor& key, const Tensor& value,
                        int gain_stride);

}  // namespace attnrb::ops
