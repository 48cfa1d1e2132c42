#include "gallery.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "buffer.hpp"
#include "distance.hpp"
#include "floats.hpp"
#include "target.hpp"

namespace spade {
namespace {

// Up to eight numbers of a part's stored vector from channel c on, a multiple of eight, as float32; zeros follow them.
SPADE_TARGET_AVX2 SPADE_INLINE __m256 load_channels(const MapPart& part, const char* vector, int c) {
    if (part.type == ElementType::kCodes) return decode_codes(vector, *part.codes, c);
    const char* from = vector + bytes_of(part.type, nullptr, c);
    if (c + 8 <= part.channels) {
        if (part.type == ElementType::kFloat16) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    }
    alignas(32) float rest[8] = {};
    decode(from, part.type, nullptr, part.channels - c, 8, rest);
    return _mm256_load_ps(rest);
}

// Writes the channels of one part. Eight are written at a time, so that up to seven zeros follow them.
SPADE_TARGET_AVX2 void decode_part(const MapPart& part, int grid_width, std::int64_t image, int location, float* to) {
    const char* map = static_cast<const char*>(part.maps[image]);
    const std::size_t vector_bytes = part.vector_bytes();
    if (part.rows.empty()) {
        const char* vector = map + location * vector_bytes;
        for (int c = 0; c < part.channels; c += 8) _mm256_storeu_ps(to + c, load_channels(part, vector, c));
        return;
    }
    const MapPart::Taps &y = part.rows[location / grid_width], &x = part.columns[location % grid_width];
    const auto at = [&](int row, int column) {
        return map + (static_cast<std::size_t>(row) * part.width + column) * vector_bytes;
    };
    const auto weighted = [&](int column, int c) SPADE_TARGET_AVX2 {
        __m256 sum = _mm256_mul_ps(_mm256_set1_ps(y.first_weight), load_channels(part, at(y.first, column), c));
        if (y.second >= 0)
            sum = _mm256_add_ps(sum,
                                _mm256_mul_ps(_mm256_set1_ps(y.second_weight), load_channels(part, at(y.second, column), c)));
        return sum;
    };
    for (int c = 0; c < part.channels; c += 8) {
        __m256 sum = _mm256_mul_ps(_mm256_set1_ps(x.first_weight), weighted(x.first, c));
        if (x.second >= 0) sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_set1_ps(x.second_weight), weighted(x.second, c)));
        _mm256_storeu_ps(to + c, sum);
    }
}

}  // namespace

SPADE_TARGET_AVX2 void Gallery::decode(std::int64_t id, int padded, float* to) const {
    const std::int64_t image = id / locations;
    const int location = static_cast<int>(id % locations);
    int c = 0;
    for (const MapPart& part : parts) {
        decode_part(part, width, image, location, to + c);
        c += part.channels;
    }
    // Whole registers, where there are such: what is written number by number cannot be read as one at once.
    if (d % 8 == 0)
        for (; c + 8 <= padded; c += 8) _mm256_storeu_ps(to + c, _mm256_setzero_ps());
    std::fill(to + c, to + padded, 0.0f);
}

void Gallery::prefetch(std::int64_t id) const {
    constexpr std::size_t line = 64;
    const std::int64_t image = id / locations;
    const int location = static_cast<int>(id % locations);
    for (const MapPart& part : parts) {
        const std::size_t bytes = part.vector_bytes();
        const char* map = static_cast<const char*>(part.maps[image]);
        const auto ask = [&](std::size_t place) {
            for (std::size_t at = 0; at < bytes; at += line) _mm_prefetch(map + place * bytes + at, _MM_HINT_T0);
        };
        if (part.rows.empty()) {
            ask(location);
            continue;
        }
        const MapPart::Taps &y = part.rows[location / width], &x = part.columns[location % width];
        for (const int row : {y.first, y.second})
            for (const int column : {x.first, x.second})
                if (row >= 0 && column >= 0) ask(static_cast<std::size_t>(row) * part.width + column);
    }
}

SPADE_TARGET_AVX2 void sq_distances_to(const Gallery& gallery, const Vectors& xq, const std::int64_t* ids, int k,
                                       float* sq_dist) {
    const ScopedDefaultFloatMode float_mode;
    const int padded = round_up(gallery.d, kDistanceAlign);
    Buffer<float> q(padded), x(padded + 8);
    const float* const rows[1] = {x.data()};
    for (int i = 0; i < xq.count; ++i) {
        decode(xq.row(i), ElementType::kFloat32, nullptr, gallery.d, padded, q.data());
        for (int j = 0; j < k; ++j, ++ids, ++sq_dist) {
            if (*ids < 0) {
                *sq_dist = std::numeric_limits<float>::infinity();
                continue;
            }
            gallery.decode(*ids, padded, x.data());
            sq_distances<1>(q.data(), rows, padded, sq_dist);
        }
    }
}

}  // namespace spade
