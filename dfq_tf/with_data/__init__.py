"""All that sees labelled images; nothing data-free imports it."""
