"""Where pictures come from: a folder that fills, a video file, a camera or stream."""
