// Copyright (C) 2026 The anomalib-osdirf authors
// SPDX-License-Identifier: Apache-2.0
// Score the binary PPM images of a folder with an exported model. Needs OpenVINO alone: no Python, no anomalib, not us.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace fs = std::filesystem;

// Read a number of a PPM file's header, past comments from '#' to the end of the line.
std::size_t read_number(std::istream& file) {
    while ((file >> std::ws).peek() == '#') {
        file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    }
    std::size_t number = 0;
    file >> number;
    return number;
}

// Read an image as the model takes it: float32 (1, 3, height, width), RGB, 0 to 1, in its own size.
ov::Tensor read_image(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    file >> std::setw(2) >> magic;
    const std::size_t width = read_number(file), height = read_number(file), maximum = read_number(file);
    file.get();  // one white space, then the pixels
    if (!file || magic != "P6" || width == 0 || height == 0 || maximum != 255) {
        throw std::runtime_error("image '" + path.string() + "' is no binary PPM file (P6) of 8 bits; convert it.");
    }
    std::vector<std::uint8_t> pixels;
    if (width <= fs::file_size(path) / 3 / height) {  // a broken header must not ask for all memory
        pixels.resize(3 * width * height);
    }
    if (pixels.empty() || !file.read(reinterpret_cast<char*>(pixels.data()), pixels.size())) {
        throw std::runtime_error("image '" + path.string() + "' ends too early; copy it again.");
    }
    ov::Tensor image(ov::element::f32, {1, 3, height, width});
    float* values = image.data<float>();
    for (std::size_t index = 0; index < pixels.size(); ++index) {
        values[index % 3 * width * height + index / 3] = pixels[index] / 255.0f;
    }
    return image;
}

std::vector<fs::path> find_images(const fs::path& folder) {
    std::vector<fs::path> images;
    if (fs::is_directory(folder)) {
        for (const auto& entry : fs::directory_iterator(folder)) {
            if (entry.path().extension() == ".ppm") {
                images.push_back(entry.path());
            }
        }
    }
    if (images.empty()) {
        throw std::runtime_error("folder '" + folder.string() + "' has no .ppm files in it; give one that has.");
    }
    std::sort(images.begin(), images.end());
    return images;
}

// OpenVINO's messages begin with where in its sources they come from; the reason is the last line.
std::string reason(const ov::Exception& error) {
    std::string text = error.what();
    text.erase(text.find_last_not_of('\n') + 1);
    return text.substr(text.rfind('\n') + 1);
}

int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: score MODEL.xml FOLDER\n";
        return 2;
    }
    try {
        const std::vector<fs::path> images = find_images(arguments[2]);
        // An .xml file asks for float32 itself; an .onnx file can't, and processors with bfloat16 would use that.
        const auto precision = ov::hint::inference_precision(ov::element::f32);
        ov::InferRequest request = ov::Core().compile_model(arguments[1], "CPU", precision).create_infer_request();
        std::cout << std::fixed << std::setprecision(6);
        for (const fs::path& path : images) {
            request.set_input_tensor(read_image(path));
            request.infer();
            const float score = request.get_tensor("pred_score").data<float>()[0];
            const bool is_defect = request.get_tensor("pred_label").data<bool>()[0];
            std::cout << path.string() << ' ' << score << (is_defect ? " defect\n" : " good\n");
        }
    } catch (const ov::Exception& error) {
        std::cerr << "model '" << arguments[1] << "' can't be used (" << reason(error) << "); export it again.\n";
        return 1;
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
