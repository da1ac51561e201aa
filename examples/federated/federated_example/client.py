"""The app of a party."""

from federated_example.task import make_data, make_model
from zofo.federated import client_app

app = client_app(make_model, make_data)
