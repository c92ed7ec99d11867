// What main() registers.
#pragma once

namespace attnrb::bench {

void register_attention();
void register_elementwise();

}  // namespace attnrb::bench
