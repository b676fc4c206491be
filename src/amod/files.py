"""The files of a saved model, by name: for whoever writes them and whoever reads them."""

WEIGHTS, ROUTERS, CONFIG, CARD = "model.safetensors", "routers.safetensors", "config.json", "README.md"
