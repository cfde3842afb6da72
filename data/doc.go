// Package data is what networks learn from: data sets and models in a local cache with their checksums, readers of the
// file formats they come in, and batches.
//
// # The cache
//
// An entry (List, Find) has a name, a licence, official addresses and the SHA-256 of each of its files. Files lie in
// Dir() under datasets/NAME/ and models/NAME/. A loader such as FashionMNIST looks there, then asks the official
// address, and otherwise fails with the command that brings the files. LATHE_OFFLINE=1 keeps everything off the
// network. Fetch, FetchPackages and Check are what `lathe data fetch` and `lathe data check` call.
//
// # Files from outside are hostile
//
// The readers (ReadIDX, ReadNPY, ReadCSV, ReadLabels, NewY4MReader, DecodeImage, DecodeJSON) check sizes before they
// allocate, never panic, and return a *FormatError that names the format, the field and the reason. What they allocate
// is bounded by the bytes that are really there, not by what a header claims.
//
// # Order
//
// Everything random takes a seed; a Batcher yields the same sequence for every arm of an experiment with that seed and
// continues from a saved state exactly.
package data
