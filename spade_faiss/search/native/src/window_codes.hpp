// Codes of whole maps: vectors as small integers, laid out so that a window's row is read in one go.
//
// All vectors of a level, less a center, are rounded to v' = step * code by one step, and how far that is from the vector is
// known, |v - v'| <= step * residual. So, with the codes' own distance D, a whole number that is summed without rounding,
//
//     |q - x|  >=  step * (D - residual of q - residual of x)                                       (triangle inequality)
//
// and a vector can be at most `limit` away only if
//
//     |code q|^2 + |code x|^2 - 2 (code q . code x)  =  D^2  <=  (limit / step + residual of q + residual of x)^2
//
// The screen computes, for eight neighboring cells at a time, half of -D^2 + |code q|^2, and compares it with a threshold that
// is made of the rest. A vector of the gallery with a number that no code holds passes always; the residual of such a query is
// large.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "buffer.hpp"
#include "gallery.hpp"
#include "vectors.hpp"

namespace spade {

// Codes of a quad lie side by side, and are multiplied together; cells are compared eight at a time.
constexpr int kQuad = 4, kCells = 8;
// What sums of cells without a vector are, which pass no threshold.
constexpr std::int32_t kNever = std::numeric_limits<std::int32_t>::min();

// What a screen reads of a map: rows of cells. A map that is narrower than eight cells is padded by cells that never pass.
struct WindowMap {
    int height, width, padded_width, quads;
    const std::int8_t* codes;     // (height, quads, padded width, kQuad)
    const std::int32_t* initial;  // (height, padded width): what sums begin with
};

// Queries of one row of the map, side by side.
struct WindowLine {
    int y, first, count;            // their row, and the columns from `first` on
    const std::uint8_t* codes;      // (count, quads, kQuad)
    const std::int32_t* threshold;  // (count): what sums must be above
};

// The cells of a window that are compared at a time: the first, and which of the eight are in the window, as bits.
struct WindowSpan {
    int begin;
    unsigned inside;
};

// A window of `reach` cells to each side, cut at the borders of a map.
struct WindowShape {
    int reach_y, reach_x;
    int spans() const { return (2 * reach_x + kCells) / kCells; }
    // How many bytes a screen writes for each query: one for each of the window's rows and spans, padded to whole words.
    int bytes() const { return (spans() * (2 * reach_y + 1) + 7) / 8 * 8; }
    int top(int y) const { return y > reach_y ? y - reach_y : 0; }
    int bottom(int y, int height) const { return y + reach_y < height ? y + reach_y : height - 1; }
    int left(int x) const { return x > reach_x ? x - reach_x : 0; }
    int right(int x, int width) const { return x + reach_x < width ? x + reach_x : width - 1; }
    // The span number `span` of a window around column x; `inside` is 0 where the window ends before it.
    WindowSpan at(int x, int span, const WindowMap& map) const {
        const int first = left(x) + span * kCells, last = right(x, map.width);
        const int begin = first + kCells <= map.padded_width ? first : map.padded_width - kCells;
        const int count = last - first + 1 < kCells ? last - first + 1 : kCells;
        return {begin, count > 0 ? ((1u << count) - 1) << (first - begin) & 0xFFu : 0};
    }
};

// Writes, for each query of a line, which cells of its window pass: within[query][span * rows + row], as bits of the span's
// cells, where rows are those of the window. What follows in a query's bytes is zero.
using ScreenWindows = void (*)(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within);

// Plain C++, which all others must equal.
void screen_windows_reference(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within);
void screen_windows_avx2(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within);
void screen_windows_avxvnni(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within);
void screen_windows_avx512vnni(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within);

// How a level's vectors are rounded, and where they are in its map. Only codes of one coding can be compared.
struct WindowCoding {
    // `center`: (d). `most`: the largest magnitude of a code. `step`: what a code of 1 stands for. `cells`: of a region of
    // interest, the cells of its locations, ascending; empty where every cell is a location.
    WindowCoding(int d, const float* center, int most, float step, int height, int width, std::vector<std::int32_t> cells);

    int locations() const { return cells.empty() ? height * width : static_cast<int>(cells.size()); }
    int cell_of(int location) const { return cells.empty() ? location : cells[location]; }
    int location_of(int cell) const { return cells.empty() ? cell : numbers[cell]; }
    // The end of the line that begins at a location: of those that follow each other in one row of the map, up to `last`.
    int line_end(int first, int last) const;

    int d, quads, most;
    float step;
    Buffer<float> center;  // (d), padded
    int height, width;
    std::vector<std::int32_t> cells, numbers;  // of locations; of cells, with -1 outside of the region

    // Rounds a vector; `codes`: (quads * kQuad), zeros behind the last. `residual` bounds |v - v'| in steps, and is infinite or
    // no number where there is none. Returns whether every number has a code.
    bool round(const float* vector, std::int8_t* codes, float& residual) const;
};

// A map of a gallery; cells outside of a region of interest never pass.
struct WindowCodes {
    // `inside`: (locations), which of them are in the image's own region of interest; null for all.
    WindowCodes(const WindowCoding& coding, const Gallery& gallery, int image, const bool* inside = nullptr);
    bool is_inside(int y, int x) const { return initial[static_cast<std::size_t>(y) * padded_width + x] != kNever; }
    WindowMap map() const { return {height, width, padded_width, quads, codes.data(), initial.data()}; }
    std::size_t nbytes() const { return codes.nbytes() + initial.nbytes(); }

    int height, width, padded_width, quads;
    bool is_whole = true;  // whether all locations are in the image's own region of interest
    float residual = 0;    // the largest of all vectors that have codes
    Buffer<std::int8_t> codes;
    Buffer<std::int32_t> initial;
};

// The queries at some locations of some maps.
struct WindowQueryCodes {
    WindowQueryCodes(const WindowCoding& coding, int count);
    // Rounds a query.
    void assign(int i, const float* query);
    // Computes the thresholds of the queries from `first` on that look for vectors at squared distances of at most limit[i *
    // stride] in a map. `margin`: 1, or less to break the bound on purpose.
    void thresholds(int first, int count, const float* limit, int stride, const WindowCodes& map, float margin,
                    std::int32_t* threshold) const;

    const WindowCoding& coding;
    Buffer<std::uint8_t> codes;    // (count, quads, kQuad)
    Buffer<std::int32_t> sq_norm;  // (count): |code q|^2
    Buffer<float> residual;        // (count)
};

}  // namespace spade
