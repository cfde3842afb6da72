// Package detect holds what stands behind and around an object detector: Soft-NMS and greedy non-maximum suppression
// on the host and inside a graph, the COCO and VOC measures of average precision, COCO files, and a small one-stage
// detector with the generated scenes that it is measured on.
//
// Boxes that go through suppression are corners (x1, y1, x2, y2); boxes of detections, ground truth and files are
// COCO's (x, y, width, height), which is what Rect says by its field names.
package detect
