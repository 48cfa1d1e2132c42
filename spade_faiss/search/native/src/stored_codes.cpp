#include "stored_codes.hpp"

#include <algorithm>

namespace spade {

StoredCodes::StoredCodes(int d, const float* scale, const std::uint8_t* bits) : d(d), vector_bytes(d), scale(d) {
    std::copy(scale, scale + d, this->scale.data());
    if (bits == nullptr) return;
    std::size_t total = 0, before = 0;
    for (int c = 0; c < d; ++c) total += bits[c];
    vector_bytes = (total + 7) / 8;
    for (int first = 0; first < d; first += 8) {
        PackedEight eight{};
        // The last words begin earlier, so that they end where the vector does.
        eight.begin = std::min(before / 8, vector_bytes > 8 ? vector_bytes - 8 : 0);
        for (int c = first; c < std::min(d, first + 8); ++c) {
            const int lane = (c - first) / 2;
            const bool odd = (c - first) % 2;
            (odd ? eight.odd_shift : eight.even_shift)[lane] = before - 8 * eight.begin;
            (odd ? eight.odd_mask : eight.even_mask)[lane] = (std::uint64_t{1} << bits[c]) - 1;
            eight.least[c - first] = (1 << bits[c]) - 1;
            before += bits[c];
        }
        packed.push_back(eight);
    }
}

}  // namespace spade
