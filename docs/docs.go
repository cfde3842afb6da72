// Package docs embeds the measured results that the repository keeps, so that the command can show them.
package docs

import (
	"embed"
	"io/fs"
)

//go:embed results
var files embed.FS

// Results is the folder of results: METHOD.json, each the JSON form of a lab.Result.
func Results() fs.FS {
	sub, err := fs.Sub(files, "results")
	if err != nil {
		return files // cannot happen: the folder is embedded
	}
	return sub
}
