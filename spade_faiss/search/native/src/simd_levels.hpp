// SIMD levels: the instruction sets that the filter is written for, and whether this machine runs them.
#pragma once

#include <string>
#include <vector>

#include "filter.hpp"
#include "window_codes.hpp"

namespace spade {

struct SimdLevel {
    const char* name;
    CodeFormat format;
    Filter filter;
    Screen screen;
    EstimateRows estimate_rows;
    ScreenWindows screen_windows;
    int most_window_code;  // the largest magnitude of a code that its screen multiplies
    int chunk_bytes;       // how many bytes of rows stay in the cache nearest to the core while all queries are filtered
    std::string why_not;   // why this processor or operating system does not run it; empty if it does
};

// All SIMD levels, the fastest first and the reference last. The processor is asked at the first call only.
const std::vector<SimdLevel>& simd_levels();

// The SIMD level of that name, or nullptr.
const SimdLevel* find_simd_level(const std::string& name);

}  // namespace spade
