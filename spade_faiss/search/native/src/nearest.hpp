// The k nearest rows of one query.
#pragma once

#include <algorithm>
#include <cstdint>

namespace spade {

// A sorted list in the caller's memory: ascending by squared distance, then by row. It begins as infinities and rows of -1.
struct Nearest {
    float* sq_dist;     // (k)
    std::int64_t* row;  // (k)
    int k;
    float bound;  // rows at larger squared distances are not wanted

    // The largest squared distance that a row can have to enter the list.
    float limit() const { return std::min(bound, sq_dist[k - 1]); }

    // Whether `row` or a later one can still enter the list: no distance is below 0, and of equal ones the first row stays.
    bool is_open_to(int first) const { return k > 1 || sq_dist[0] > 0 || row[0] > first; }

    void offer(float found, std::int64_t of_row) {
        if (!(found <= bound) || !precedes(found, of_row, k - 1)) return;
        int place = k - 1;
        for (; place > 0 && precedes(found, of_row, place - 1); --place) {
            sq_dist[place] = sq_dist[place - 1];
            row[place] = row[place - 1];
        }
        sq_dist[place] = found;
        row[place] = of_row;
    }

private:
    // Whether a row goes before the one at `place`. As an unsigned number, the -1 of an empty place is larger than any row.
    bool precedes(float found, std::int64_t of_row, int place) const {
        return found < sq_dist[place] ||
               (found == sq_dist[place] && static_cast<std::uint64_t>(of_row) < static_cast<std::uint64_t>(row[place]));
    }
};

}  // namespace spade
