// Threads: torch's, so that `torch.set_num_threads` rules here too.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace int8fx {

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// body(begin, end) on parts of [0, n), in several threads if there are more than `grain` items.
template <typename Body>
inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

// How many items of this many operations are worth a thread.
inline int64_t grain_of(int64_t operations) { return operations < 32768 ? 32768 / (operations + 1) + 1 : 1; }

}  // namespace int8fx
