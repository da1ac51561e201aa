"""The app of the server."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from federated_example.task import make_model
from zofo.federated import FederatedOptions, HybridStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    options = FederatedOptions(
        num_steps=int(config["num-steps"]),
        base_lr=float(config["base-lr"]),
        adapter_lr=float(config["adapter-lr"]),
        eps=1e-4,
        distribution="rank-one",
        directions_per_step="rows",
    )
    strategy = HybridStrategy(
        make_model,
        options,
        # One party measures the accuracy on test rows, which all have.
        adapter_strategy=FedAvg(
            fraction_train=float(config["fraction"]), fraction_evaluate=1e-9,
            min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1,
        ),
        folder=str(config["folder"]) or None,
    )  # fmt: skip
    strategy.start(grid, strategy.arrays, num_rounds=int(config["num-rounds"]), timeout=600)
