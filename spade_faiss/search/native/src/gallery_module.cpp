// Python's Gallery: arguments are checked here, computing runs without the GIL.
#include "gallery_module.hpp"

#include <utility>

#include "arguments.hpp"
#include "module.hpp"

namespace spade {
namespace {

// The taps of an axis, from arrays (length, 2) of stored positions and of their weights.
std::vector<MapPart::Taps> taps_of(const py::array_t<std::int32_t>& positions, const py::array_t<float>& weights, int length,
                                   int stored) {
    require(positions.ndim() == 2 && positions.shape(0) == length && positions.shape(1) == 2 && weights.ndim() == 2 &&
                weights.shape(0) == length && weights.shape(1) == 2,
            "taps must be two arrays (" + std::to_string(length) + ", 2)");
    std::vector<MapPart::Taps> taps;
    for (int i = 0; i < length; ++i) {
        taps.push_back({positions.at(i, 0), positions.at(i, 1), weights.at(i, 0), weights.at(i, 1)});
        require(0 <= taps[i].first && taps[i].first < stored && -1 <= taps[i].second && taps[i].second < stored,
                "taps must be positions of the stored map");
    }
    return taps;
}

// `parts`: for each stored map, the arrays of all images, None or their StoredCodes, and None or its height, its width,
// and the taps of both axes.
std::unique_ptr<OwnedGallery> make_gallery(int height, int width, const py::list& parts) {
    require(height > 0 && width > 0 && static_cast<std::int64_t>(height) * width < (1 << 28),
            "maps must be 1 to 2^28 locations");
    require(!parts.empty(), "there must be a part");
    auto owned = std::make_unique<OwnedGallery>();
    Gallery& gallery = owned->gallery;
    gallery = {0, width, height * width, 0, {}};
    std::size_t images = 0;
    for (const py::handle& item : parts) {
        const auto part = item.cast<py::tuple>();
        const auto arrays = part[0].cast<py::list>();
        MapPart made;
        int stored = gallery.locations;
        const auto* codes = part[1].cast<const StoredCodes*>();  // nullptr for None
        if (!part[2].is_none()) {
            const auto [rows, columns] = part[2].cast<std::pair<int, int>>();
            require(rows > 0 && columns > 0, "a stored map must not be empty");
            using Taps = std::pair<py::array_t<std::int32_t>, py::array_t<float>>;
            const auto along_rows = part[3].cast<Taps>(), along_columns = part[4].cast<Taps>();
            made.rows = taps_of(along_rows.first, along_rows.second, height, rows);
            made.columns = taps_of(along_columns.first, along_columns.second, width, columns);
            stored = rows * columns;
            made.width = columns;
        } else {
            made.width = width;
        }
        for (const py::handle& array : arrays) {
            const Vectors vectors = stored_of(array.cast<py::array>(), codes, "maps");
            if (made.maps.empty()) {
                made.type = vectors.type;
                made.codes = codes;
                made.channels = vectors.d;
            }
            require(vectors.count == stored && vectors.d == made.channels && vectors.type == made.type,
                    "maps must be of one shape and type");
            made.maps.push_back(vectors.data);
            owned->kept.append(array);
        }
        owned->kept.append(part[1]);
        require(!made.maps.empty() && (images == 0 || made.maps.size() == images), "all parts must be of the same images");
        images = made.maps.size();
        gallery.d += made.channels;
        gallery.parts.push_back(std::move(made));
    }
    require(gallery.d <= kMostChannels, "vectors must have 1 to 65536 channels");
    gallery.count = static_cast<std::int64_t>(images) * gallery.locations;
    return owned;
}

py::array_t<float> py_vectors(const OwnedGallery& owned, const py::array_t<std::int64_t, py::array::c_style>& ids) {
    const Gallery& gallery = owned.gallery;
    require(ids.ndim() == 1, "ids must be (n,)");
    const auto count = ids.shape(0);
    for (py::ssize_t i = 0; i < count; ++i)
        require(0 <= ids.at(i) && ids.at(i) < gallery.count, "ids must be those of vectors");
    py::array_t<float> vectors({count, static_cast<py::ssize_t>(gallery.d)});
    float* out = vectors.mutable_data();
    const std::int64_t* id = ids.data();
    const py::gil_scoped_release released;
    const int padded = round_up(gallery.d, 8);
    Buffer<float> one(padded + 8);
    for (py::ssize_t i = 0; i < count; ++i) {
        gallery.decode(id[i], padded, one.data());
        std::copy_n(one.data(), gallery.d, out + i * gallery.d);
    }
    return vectors;
}

py::array_t<float> py_sq_distances(const OwnedGallery& owned, const py::array& queries,
                                   const py::array_t<std::int64_t, py::array::c_style>& ids) {
    const Gallery& gallery = owned.gallery;
    const Vectors xq = vectors_of(queries, "queries");
    require(xq.type == ElementType::kFloat32 && xq.d == gallery.d, "queries must be (n, d) float32");
    require(ids.ndim() == 2 && ids.shape(0) == xq.count, "ids must be (n, k)");
    const int k = static_cast<int>(ids.shape(1));
    const std::int64_t* id = ids.data();
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(xq.count) * k; ++i)
        require(-1 <= id[i] && id[i] < gallery.count, "ids must be those of vectors, or -1");
    py::array_t<float> D({static_cast<py::ssize_t>(xq.count), static_cast<py::ssize_t>(k)});
    float* sq_dist = D.mutable_data();
    const py::gil_scoped_release released;
    sq_distances_to(gallery, xq, id, k, sq_dist);
    return D;
}

}  // namespace

void define_gallery(py::module_& module) {
    py::class_<OwnedGallery>(module, "Gallery")
        .def(py::init(&make_gallery), py::arg("height"), py::arg("width"), py::arg("parts"))
        .def_property_readonly("count", [](const OwnedGallery& self) { return self.gallery.count; })
        .def("vectors", &py_vectors, py::arg("ids"), "The vectors (n, d) of these ids.")
        .def("sq_distances", &py_sq_distances, py::arg("queries"), py::arg("ids"),
             "The squared distances (n, k) of queries (n, d) to the vectors of ids (n, k); infinite for an id of -1.");
}

}  // namespace spade
